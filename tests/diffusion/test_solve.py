"""Solvers against diffusers' schedulers over whole trajectories, and batched against single rows."""

from itertools import pairwise

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close

from dreambooth_lab.config import enums
from dreambooth_lab.diffusion.path import RectifiedFlow, VariancePreserving
from dreambooth_lab.diffusion.solve import SOLVERS

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHAS = DPMSolverMultistepScheduler(**BETAS).alphas_cumprod
VP = {kind.value: VariancePreserving(ALPHAS, kind) for kind in enums.Prediction}
PATHS = VP | {"flow": RectifiedFlow(1000)}
THEIRS = {enums.Sampler.dpm: DPMSolverMultistepScheduler, enums.Sampler.unipc: UniPCMultistepScheduler}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_sampler = pytest.mark.parametrize("sampler", enums.Sampler, ids=lambda s: s.value)


def sample(rows=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, 8, 8, generator=g), torch.randn(rows, 4, 8, 8, generator=g)


def network(x, t):
    """A smooth function of sample and time, as inaccurate as an untrained network."""
    return torch.tanh(1.3 * x + t.float().view(-1, 1, 1, 1)) + 0.3 * x


def solve(path, sampler, x, times, predict=network):
    """Through `times`, one [B] after the other."""
    solver = SOLVERS[sampler](path)
    for t, s in pairwise(times):
        x = solver.step(predict(x, t), x, t, s)
    return x


def follow(scheduler, x, path, native=False):
    """diffusers' own loop with the same network, at the scheduler's timesteps."""
    for step in scheduler.timesteps:
        t = path.time(step.expand(len(x))) if native else step.double().expand(len(x)) / path.num_steps
        x = scheduler.step(network(scheduler.scale_model_input(x, step), t), step, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("prediction", VP)
@pytest.mark.parametrize("sampler", THEIRS, ids=lambda s: s.value)
def test_trajectory_matches_diffusers_scheduler(sampler, prediction, steps):
    path, (x, _) = VP[prediction], sample()
    scheduler = THEIRS[sampler](**BETAS, prediction_type=prediction, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    times = [path.time(n.expand(len(x))) for n in (*scheduler.timesteps, torch.tensor(-1))]
    assert_close(solve(path, sampler, x, times), follow(scheduler, x, path, native=True), atol=3e-4, rtol=3e-4)


@pytest.mark.parametrize("prediction", VP)
def test_trajectory_matches_euler(prediction):
    path, (x, _) = VP[prediction], sample()
    scheduler = EulerDiscreteScheduler(**BETAS, prediction_type=prediction, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(20)
    native = scheduler.timesteps.long()
    times = [path.time(n.expand(len(x))) for n in (*native, torch.tensor(-1))]
    alpha = path.exact_scales(times[0])[0][0].float()
    theirs = follow(scheduler, x / alpha, path, native=True)  # its samples are x / α
    assert_close(solve(path, enums.Sampler.euler, x, times), theirs, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", enums.Sampler, ids=lambda s: s.value)
def test_flow_trajectory_matches_diffusers_scheduler(sampler, shift):
    path, (x, _) = PATHS["flow"], sample()
    if sampler is enums.Sampler.euler:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = THEIRS[sampler](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(20)
    times = [s.double().expand(len(x)) for s in scheduler.sigmas[:-1]] + [torch.full((len(x),), -1.0, dtype=torch.float64)]
    theirs, i = x, iter(times)
    for step in scheduler.timesteps:
        theirs = scheduler.step(network(theirs, next(i)), step, theirs).prev_sample
    assert_close(solve(path, sampler, x, times), theirs, atol=3e-4, rtol=3e-4)


@every_path
@every_sampler
def test_rows_with_different_times_match_single_row_results(path, sampler):
    x, _ = sample(3)
    start = torch.tensor([0.9, 0.5, 0.31], dtype=torch.float64)
    length = torch.tensor([4, 2, 0])

    def times(rows):
        return [start[rows] - 0.03 * torch.minimum(torch.tensor(i), length[rows]) for i in range(5)]

    together = solve(path, sampler, x, times(slice(None)))
    assert together.isfinite().all() and torch.equal(together[2], x[2]), "a step of length 0 is the identity"
    for row in range(3):
        own = times(slice(row, row + 1))[: int(length[row]) + 1]
        assert_close(together[row : row + 1], solve(path, sampler, x[row : row + 1], own), atol=1e-5, rtol=1e-5)


@every_path
@every_sampler
def test_exact_prediction_stays_on_the_path(path, sampler):
    x0, eps = sample()
    times = [torch.full((4,), t, dtype=torch.float64) for t in (0.97, 0.9, 0.6, 0.59, 0.2, 0.01, -1.0)]
    arrived = solve(path, sampler, path.noise(x0, eps, times[0]), times, lambda x, t: path.target(x0, eps, t))
    assert_close(arrived, x0, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", [enums.Sampler.dpm, enums.Sampler.unipc], ids=lambda s: s.value)
def test_flow_can_start_at_pure_noise(sampler):
    x0, eps = sample()
    path, times = PATHS["flow"], [torch.full((4,), t, dtype=torch.float64) for t in (1.0, 0.8, 0.6, 0.4)]
    arrived = solve(path, sampler, eps, times, lambda x, t: path.target(x0, eps, t))
    assert_close(arrived, path.noise(x0, eps, times[-1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", VP.values(), ids=VP)
def test_higher_order_solver_is_closer_to_the_true_trajectory(path):
    x, _ = sample()

    def error(sampler, number):
        times = [torch.full((4,), 0.8 - 0.4 * i / number, dtype=torch.float64) for i in range(number + 1)]
        return solve(path, sampler, x, times)

    truth = error(enums.Sampler.dpm, 200)
    errors = {s: (error(s, 10) - truth).norm() for s in enums.Sampler}
    assert (
        errors[enums.Sampler.dpm] < 0.6 * errors[enums.Sampler.euler]
        and errors[enums.Sampler.unipc] < 0.6 * errors[enums.Sampler.euler]
    )


@pytest.mark.parametrize("path", VP.values(), ids=VP)
@every_sampler
def test_steps_shorter_than_one_native_timestep_stay_on_the_path(path, sampler):
    """Some start and end within the same native timestep."""
    x0, eps = sample()
    times = [torch.full((4,), 0.9 - i / 3000, dtype=torch.float64) for i in range(8)]
    assert len({int(path.native(t)[0]) for t in times}) < 5
    reached = solve(path, sampler, path.noise(x0, eps, times[0]), times, lambda _, t: path.target(x0, eps, t))
    assert_close(reached, path.noise(x0, eps, times[-1]), atol=1e-3, rtol=1e-3)
