"""Rollout: rows reach t as sampling would, and are told the way back."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.batch import Cond
from dreambooth_lab.config import ConfigError, Ramp, Sampler
from dreambooth_lab.diffusion.path import Prediction, RectifiedFlow, VariancePreserving
from dreambooth_lab.rollout import Direct, Grid, InputPerturbation, ReflexFlow, Walk, build_reflexflow, build_rollout, ramp

ALPHAS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
ZERO = VariancePreserving(
    DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod, Prediction.v_prediction
)
PATHS = {p.value: VariancePreserving(ALPHAS, p) for p in Prediction} | {"flow": RectifiedFlow(1000)}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_sampler = pytest.mark.parametrize("sampler", Sampler, ids=lambda s: s.value)


def config(*overrides):
    return lab.compose("rollout.enabled=true", "rollout.ramp_steps=0", *overrides).rollout


def rows(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, eps, xi = (torch.randn(n, 4, 8, 8, generator=g) for _ in range(3))
    t = 0.1 + 0.85 * torch.rand(n, generator=g, dtype=torch.float64)
    draws = torch.rand(n, 2, generator=g, dtype=torch.float64)
    batch = SimpleNamespace(eps=eps, xi=xi, walk=draws, latents=lambda: x0)
    return x0, batch, Cond(states=torch.arange(n).float().view(n, 1, 1)), t


def network(x, t, cond):
    return torch.tanh(1.2 * x + t.float().view(-1, 1, 1, 1) + 0.1 * cond["states"][:, :, :, None])


def unshifted(height, width):
    return 1.0


def walk(cfg, path, predict=network, top=1.0):
    return Walk(cfg, path, top, unshifted, predict, nullcontext)


def lengths_of(made, walk, t, step):
    return made.lengths(walk, t, step, Grid(made.grid, made.shift(8, 8)))


@every_path
@every_sampler
@pytest.mark.parametrize("grid", [28, "native"])
def test_an_oracle_stays_on_the_path(path, sampler, grid):
    x0, batch, cond, t = rows()

    def oracle(x, now, cond):
        mine = cond["states"][:, 0, 0].long()
        return path.target(x0[mine], batch.eps[mine], now)

    at = walk(config(f"rollout.sampler={sampler.value}", f"rollout.grid={grid}"), path, oracle)(x0, batch, cond, t, 5)
    assert at.strayed.any()
    assert_close(at.x_t, path.noise(x0, batch.eps, t), atol=1e-3, rtol=1e-3)
    assert_close(at.eps, batch.eps, atol=2e-2, rtol=2e-2)


@every_path
def test_the_corrected_target_points_back_at_the_picture(path):
    x0, batch, cond, t = rows()
    at = walk(config("rollout.max_step_offset=8"), path)(x0, batch, cond, t, 5)
    assert (at.x_t - path.noise(x0, batch.eps, t))[at.strayed].abs().max() > 0.05, "this network does drift"
    back, _ = path.split(path.target(x0, at.eps, t), at.x_t, t)
    assert_close(back, x0, atol=1e-3, rtol=1e-3)
    original = walk(config("rollout.max_step_offset=8", "rollout.target=original"), path)(x0, batch, cond, t, 5)
    assert torch.equal(original.eps, batch.eps) and torch.equal(original.x_t, at.x_t)


@every_path
@every_sampler
@pytest.mark.parametrize("off", ["rollout.probability=0", "rollout.min_time=1"])
def test_a_walk_of_no_length_is_no_rollout_to_the_bit(path, sampler, off):
    x0, batch, cond, t = rows()
    at = walk(config(f"rollout.sampler={sampler.value}", off), path, None)(x0, batch, cond, t, 5)
    plain = Direct(path)(x0, batch, cond, t, 5)
    assert all(torch.equal(a, b) for a, b in zip(at, plain, strict=True))


@every_path
@every_sampler
def test_a_batch_walks_as_its_rows_do_one_by_one_with_few_forwards(path, sampler):
    x0, batch, cond, t = rows()
    cfg, calls = config(f"rollout.sampler={sampler.value}"), []
    counted = walk(cfg, path, lambda x, *a: calls.append(len(x)) or network(x, *a))
    at = counted(x0, batch, cond, t, 5)
    lengths = lengths_of(counted, batch.walk, t, 5)
    assert len(set(lengths.tolist())) > 2
    assert calls == [int((lengths > i).sum()) for i in range(int(lengths.max()))]
    for i in range(len(t)):
        one = SimpleNamespace(eps=batch.eps[i : i + 1], walk=batch.walk[i : i + 1])
        alone = walk(cfg, path)(x0[i : i + 1], one, cond.take(torch.tensor([i])), t[i : i + 1], 5)
        assert_close(at.x_t[i : i + 1], alone.x_t, atol=1e-5, rtol=1e-5)
        assert_close(at.eps[i : i + 1], alone.eps, atol=1e-4, rtol=1e-4)


def test_walks_have_every_length_equally_often_and_end_below_the_top():
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    draws, t = torch.stack([torch.zeros_like(u), u], 1), torch.full_like(u, 0.5)
    made = walk(config("rollout.max_step_offset=4"), PATHS["flow"])
    assert torch.bincount(lengths_of(made, draws, t, 0)).tolist() == [0, 1000, 1000, 1000, 1000]
    high = lengths_of(made, draws, torch.full_like(u, 1 - 2.5 / 28), 0)
    assert high.max() == 2, "there are two strides and a half up to pure noise"
    limited = walk(config("rollout.max_step_offset=4"), PATHS["flow"], top=0.55)
    assert lengths_of(limited, draws, t, 0).max() == 1, "nor above what the model was trained on"


@every_sampler
@pytest.mark.parametrize("grid", [28, "native"])
@pytest.mark.parametrize("shift", ["1.0", "3.0"])
def test_with_zero_terminal_snr_no_walk_starts_at_pure_noise_and_all_is_a_number(sampler, grid, shift):
    x0, batch, cond, _ = rows(8)
    t = torch.tensor([0.3, 0.9, 0.97, 0.995, 0.998, 0.9985, 0.99905, 0.99999], dtype=torch.float64)
    batch.walk = torch.tensor([[0.0, 0.99]] * 8, dtype=torch.float64)
    seen = []
    spy = lambda x, now, cond: seen.extend(now.tolist()) or network(x, now, cond)  # noqa: E731
    words = (f"rollout.sampler={sampler.value}", f"rollout.grid={grid}", f"rollout.shift={shift}", "rollout.max_step_offset=8")
    made = walk(config(*words), ZERO, spy)
    at = made(x0, batch, cond, t, 5)
    assert max(seen) <= ZERO.top + 1e-9 and ZERO.native(torch.tensor(seen)).max() <= 998
    assert at.x_t.isfinite().all() and at.eps.isfinite().all()
    length = lengths_of(made, batch.walk, t, 5)
    assert torch.equal(at.strayed, length > 0) and length.min() == 0 and length[0] == 8
    plain = Direct(ZERO)(x0, batch, cond, t, 5)
    assert torch.equal(at.x_t[~at.strayed], plain.x_t[~at.strayed]) and torch.equal(at.eps[~at.strayed], plain.eps[~at.strayed])


def test_the_grid_is_shifted_as_the_model_is_for_the_size_unless_a_number_is_said():
    asked = []
    x0, batch, cond, t = rows(1)
    batch.walk, t = torch.tensor([[0.0, 0.99]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)

    def starts(shift):
        seen = []
        spy = lambda x, now, cond: seen.append(float(now)) or network(x, now, cond)  # noqa: E731
        cfg = config("rollout.max_step_offset=2", "rollout.grid=10", f"rollout.shift={shift}")
        Walk(cfg, PATHS["flow"], 1.0, lambda *size: asked.append(size) or 3.0, spy, nullcontext)(x0, batch, cond, t, 0)
        return seen

    assert_close(starts("model"), [3 * u / (1 + 2 * u) for u in (0.45, 0.35)])
    assert asked == [(8, 8)]
    assert_close(starts("1.0"), [0.7, 0.6])
    assert asked == [(8, 8)]


def test_strides_are_those_of_inference():
    seen = []
    x0, batch, cond, _ = rows(1)
    batch.walk = torch.tensor([[0.0, 0.99]], dtype=torch.float64)
    t = torch.tensor([0.5], dtype=torch.float64)
    spy = lambda x, now, cond: seen.append(float(now)) or network(x, now, cond)  # noqa: E731
    walk(config("rollout.max_step_offset=3", "rollout.grid=10"), PATHS["flow"], spy)(x0, batch, cond, t, 0)
    assert_close(seen, [0.8, 0.7, 0.6])
    seen.clear()
    walk(config("rollout.max_step_offset=3", "rollout.grid=native"), PATHS["epsilon"], spy)(x0, batch, cond, t, 0)
    assert PATHS["epsilon"].native(torch.tensor(seen, dtype=torch.float64)).tolist() == [503, 502, 501]
    seen.clear()
    walk(config("rollout.max_step_offset=2", "rollout.grid=10", "rollout.shift=3"), PATHS["flow"], spy)(x0, batch, cond, t, 0)
    assert_close(seen, [3 * u / (1 + 2 * u) for u in (0.45, 0.35)])


def test_the_walk_is_without_gradient_and_at_rest():
    x0, batch, cond, t = rows()
    weight, inside = torch.ones((), requires_grad=True), []

    class Rest:
        def __enter__(self):
            inside.append("in")

        def __exit__(self, *_):
            inside.append("out")

    def predict(x, now, cond):
        inside.append(torch.is_grad_enabled())
        return weight * network(x, now, cond)

    at = Walk(config(), PATHS["flow"], 1.0, unshifted, predict, Rest)(x0, batch, cond, t, 5)
    assert not at.x_t.requires_grad and inside[0] == "in" and inside[-1] == "out" and set(inside[1:-1]) == {False}


@pytest.mark.parametrize(("shape", "quarter"), [(Ramp.linear, 0.25), (Ramp.cosine, 0.5 - 0.5 * 2**-0.5)])
def test_the_ramp_rises(shape, quarter):
    values = [ramp(step, 0.8, 1000, shape) for step in (0, 250, 500, 1000, 5000)]
    assert_close(values, [0.0, 0.8 * quarter, 0.4, 0.8, 0.8])
    assert ramp(0, 0.8, 0, shape) == 0.8


def test_the_seed_projects_own_example_ramps_up():
    """max_step_offset 10, probability 1, ramp_steps 1000, unipc: from no rollout at all to every row."""
    cfg = lab.compose("rollout.enabled=true", "rollout.max_step_offset=10", "rollout.probability=1.0",
                      "rollout.ramp_steps=1000", "rollout.sampler=unipc").rollout  # fmt: skip
    made, t = walk(cfg, PATHS["epsilon"]), torch.full((2000,), 0.5, dtype=torch.float64)
    draws = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = [(lengths_of(made, draws, t, step) > 0).double().mean().item() for step in (0, 250, 500, 750, 1000, 9000)]
    assert shares[0] == 0 and shares[-2:] == [1.0, 1.0] and shares == sorted(shares)
    assert_close(shares, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0], atol=0.03, rtol=0)


def test_a_row_that_rolls_out_goes_on_doing_so_as_the_ramp_rises():
    draws = torch.rand(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made, t = walk(config("rollout.ramp_steps=1000"), PATHS["flow"]), torch.full((64,), 0.4, dtype=torch.float64)
    lengths = torch.stack([lengths_of(made, draws, t, step) for step in range(0, 2000, 50)])
    before, after = lengths[:-1], lengths[1:]
    assert ((before == 0) | (before == after)).all() and (before != after).any()


@every_path
def test_input_perturbation_adds_noise_that_the_answer_leaves_out(path):
    x0, batch, cond, t = rows()
    made = InputPerturbation(
        config("rollout.kind=input_perturbation", "rollout.probability=0.5", "rollout.perturbation=0.3"), path
    )
    at = made(x0, batch, cond, t, 0)
    assert torch.equal(at.eps, batch.eps) and torch.equal(at.strayed, batch.walk[:, 0] < 0.5) and 0 < at.strayed.sum() < 6
    assert_close(at.x_t[at.strayed], path.noise(x0, batch.eps + 0.3 * batch.xi, t)[at.strayed])
    assert torch.equal(at.x_t[~at.strayed], path.noise(x0, batch.eps, t)[~at.strayed])


def test_what_is_built_is_what_is_said():
    made = [build_rollout(lab.compose(*words).rollout, PATHS["flow"], 1.0, unshifted, network, nullcontext)
            for words in ([], ["rollout.enabled=true"], ["rollout.enabled=true", "rollout.kind=input_perturbation"])]  # fmt: skip
    assert [type(m) for m in made] == [Direct, Walk, InputPerturbation]


def test_reflexflow_turns_towards_the_picture():
    x0, batch, _, t = rows()
    path = PATHS["flow"]
    x_t = path.noise(x0, batch.eps, t) + 0.3 * batch.xi
    strayed = torch.tensor([True, True, False, True, False, True])
    terms = ReflexFlow(10.0, 0.0, path, network)
    assert_close(terms.turn(7 * (x_t - x0), x_t, x0, strayed, None), torch.zeros(6), atol=1e-5, rtol=0)
    away = terms.turn(-(x_t - x0), x_t, x0, strayed, None)
    assert_close(away, 40.0 * strayed.float()), "opposite unit vectors are 2 apart"
    v = (x_t - x0).clone().requires_grad_()
    mask = torch.zeros(6, 1, 8, 8)
    mask[..., :4] = 1
    terms.turn(v + batch.xi, x_t, x0, strayed, mask).sum().backward()
    assert v.grad[2].abs().sum() == 0 < v.grad[0].abs().sum()
    assert v.grad[..., 4:].abs().sum() == 0, "nothing is turned outside the mask"


def test_reflexflow_weighs_what_drift_changed():
    x0, batch, cond, t = rows()
    path, strayed = PATHS["flow"], torch.tensor([True] * 3 + [False] * 3)
    at = path.noise(x0, batch.eps, t)
    drift = torch.zeros_like(at)
    drift[..., :2] = 0.5
    weight = ReflexFlow(0.0, 2.0, path, network).lost(network(at + drift, t, cond), batch, cond, t, strayed)
    assert torch.equal(weight[3:], torch.ones(3, 4, 8, 8)) and torch.equal(weight[:3, ..., 2:], torch.ones(3, 4, 8, 6))
    assert (weight[:3, ..., :2] > 1).all()
    assert_close(weight[:3].mean((1, 2, 3)), torch.full((3,), 3.0))


def test_reflexflow_needs_a_flow():
    cfg = config("rollout.reflexflow.direction=10")
    assert build_reflexflow(cfg, PATHS["flow"], network) is not None
    assert build_reflexflow(config(), PATHS["epsilon"], network) is None
    with pytest.raises(ConfigError, match="does not predict a flow's velocity"):
        build_reflexflow(cfg, PATHS["epsilon"], network)
