import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreambooth_lab import batch
from dreambooth_lab.config import enums
from dreambooth_lab.diffusion.path import RectifiedFlow, VariancePreserving
from dreambooth_lab.diffusion.solve import SOLVERS
from dreambooth_lab.losses import time_weight

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHAS = DDPMScheduler(**BETAS).alphas_cumprod
ZERO = VariancePreserving(DDPMScheduler(**BETAS, rescale_betas_zero_snr=True).alphas_cumprod, enums.Prediction.v_prediction)
PATHS = {p.value: VariancePreserving(ALPHAS, p) for p in enums.Prediction} | {"flow": RectifiedFlow(1000)}
path_of_each_kind = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def sample(rows=5):
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, 4, 8, 8, generator=g),
        torch.randn(rows, 4, 8, 8, generator=g),
        torch.rand(rows, generator=g),
    )


@path_of_each_kind
def test_target_splits_into_data_and_noise(path):
    x0, eps, t = sample()
    x_t = path.noise(x0, eps, t)
    got = path.split(path.target(x0, eps, t), x_t, t)
    assert_close(got, (x0, eps), atol=1e-4, rtol=1e-4)


@path_of_each_kind
def test_exact_prediction_steps_along_the_path(path):
    x0, eps, t = sample()
    s = t * torch.tensor([1.0, 0.7, 0.5, 0.2, 0.0])
    stepped = path.step(path.target(x0, eps, t), path.noise(x0, eps, t), t, s)
    assert_close(stepped, path.noise(x0, eps, s), atol=1e-4, rtol=1e-4)


@path_of_each_kind
def test_time_below_zero_is_clean_data(path):
    x0, eps, t = sample()
    assert_close(path.noise(x0, eps, torch.full_like(t, -1e-3)), x0)


def test_noise_matches_diffusers_add_noise():
    x0, eps, _ = sample(4)
    native = torch.tensor([0, 1, 500, 999])
    path = PATHS["epsilon"]
    t = path.time(native)
    assert torch.equal(path.native(t), native)
    assert_close(path.noise(x0, eps, t), DDPMScheduler(**BETAS).add_noise(x0, eps, native))
    v = DDPMScheduler(**BETAS).get_velocity(x0, eps, native)
    assert_close(PATHS["v_prediction"].target(x0, eps, t), v)


def test_native_timesteps_are_drawn_uniformly():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert (torch.bincount(PATHS["epsilon"].native(u), minlength=1000) == 10).all()


@pytest.mark.parametrize("prediction", list(enums.Prediction), ids=lambda p: p.value)
def test_trajectory_matches_ddim(prediction):
    path = PATHS[prediction.value]
    scheduler = DDIMScheduler(
        **BETAS, prediction_type=prediction.value, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading"
    )
    scheduler.set_timesteps(20)

    def network(x, native):
        return torch.tanh(x * 1.3) + 0.001 * native

    ours = theirs = sample()[0]
    grid = [int(n) for n in scheduler.timesteps]
    for native, after in zip(grid, [*grid[1:], -1], strict=True):
        theirs = scheduler.step(network(theirs, native), native, theirs).prev_sample
        t, s = (path.time(torch.full((5,), n)) for n in (native, after))
        ours = path.step(network(ours, native), ours, t, s)
    assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("path", [*PATHS.values(), ZERO], ids=[*PATHS, "zero terminal SNR"])
def test_gain_converts_prediction_error_to_noise_error(path):
    output, target, _ = sample()
    x_t, t = output.flip(0), torch.tensor([0.0, 0.2, 0.5, 0.9, 0.9995], dtype=torch.float64)
    implied = path.split(output, x_t, t)[1] - path.split(target, x_t, t)[1]
    gain = path.gain(t)
    assert gain.isfinite().all() and gain.dtype is torch.float64
    assert_close(implied.square(), gain.float().view(-1, 1, 1, 1) * (output - target).square(), atol=1e-6, rtol=1e-3)


def test_zero_terminal_snr_excludes_the_pure_noise_step():
    x0, eps, t = sample()
    last = torch.full_like(t, 0.9995)
    assert torch.equal(ZERO.noise(x0, eps, last), eps) and torch.equal(ZERO.target(x0, eps, last), -x0)
    assert ZERO.snr(last).max() == 0 == ZERO.gain(last).max()
    assert ZERO.native(torch.tensor([ZERO.top])).tolist() == [998] and float(ZERO.snr(torch.tensor([ZERO.top]))) > 0
    assert all(path.top == 1 for path in PATHS.values())
    got = ZERO.split(ZERO.target(x0, eps, last), eps, last)
    assert_close(got, (x0, eps), atol=1e-6, rtol=0)


@path_of_each_kind
def test_float64_is_not_used_on_devices_without_it(path, monkeypatch):
    """Apple's GPUs, imitated by the meta device: the results of every operator are checked."""
    monkeypatch.setattr(batch, "WITHOUT_FLOAT64", ("meta",))
    path = copy.copy(path)
    path.copies = {}
    when, meta = torch.rand(3, dtype=torch.float64), torch.device("meta")
    with NoFloat64("meta"):
        x0, t = torch.randn(3, 4, 8, 8, device=meta), batch.to_device(when, meta)
        x_t = path.noise(x0, x0, t)
        path.step(path.target(x0, x0, t), x_t, t, t / 2)
        path.implied_noise(x_t, x0, t)
        for kind in enums.Weight:
            time_weight(kind, 5.0, path, t)
        for solver in SOLVERS.values():
            stepper = solver(path)
            for s in (t / 2, t / 4, t / 8):
                stepper.step(x_t, x_t, t, s)


@path_of_each_kind
def test_scales_in_float32_match_float64(path, monkeypatch):
    t = (torch.arange(0, 999, dtype=torch.float64) + 0.5) / 1000
    exact, native = path.exact_scales(t), path.native(t)
    monkeypatch.setattr(batch, "WITHOUT_FLOAT64", ("cpu",))
    path = copy.copy(path)
    path.copies = {}
    assert path.exact_scales(t)[0].dtype is torch.float32
    assert_close(path.exact_scales(t), exact, check_dtype=False, atol=1e-6, rtol=1e-5)
    assert_close(path.native(t), native, check_dtype=False, atol=1e-4, rtol=1e-6)


class NoFloat64(TorchDispatchMode):
    """Fails when an operator returns float64 on a device."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device:
                assert leaf.dtype is not torch.float64, func
        return out
