"""Rollout: rows reach t by sampler steps, with a target that points back to the image."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.batch import Cond
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.diffusion.path import RectifiedFlow, VariancePreserving
from dreambooth_lab.rollout import (
    Grid,
    InputPerturbation,
    ModelRollout,
    NoRollout,
    ReflexFlow,
    build_reflexflow,
    build_rollout,
    ramp,
)

ALPHAS = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
ZERO = VariancePreserving(
    DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod, enums.Prediction.v_prediction
)
PATHS = {p.value: VariancePreserving(ALPHAS, p) for p in enums.Prediction} | {"flow": RectifiedFlow(1000)}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_sampler = pytest.mark.parametrize("sampler", enums.Sampler, ids=lambda s: s.value)


def config(*overrides):
    """Steps long enough for visible drift."""
    return lab.compose("rollout.enabled=true", "rollout.ramp_steps=0", "rollout.num_steps=28", *overrides).rollout


def rows(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, eps, xi = (torch.randn(n, 4, 8, 8, generator=g) for _ in range(3))
    t = 0.1 + 0.85 * torch.rand(n, generator=g, dtype=torch.float64)
    draws = torch.rand(n, 2, generator=g, dtype=torch.float64)
    batch = SimpleNamespace(eps=eps, xi=xi, rollout_draws=draws, latents=lambda: x0)
    return x0, batch, Cond(states=torch.arange(n).float().view(n, 1, 1)), t


def network(x, t, cond):
    return torch.tanh(1.2 * x + t.float().view(-1, 1, 1, 1) + 0.1 * cond["states"][:, :, :, None])


def unshifted(height, width):
    return 1.0


def make_rollout(cfg, path, predict=network, top=1.0):
    return ModelRollout(cfg, path, top, unshifted, predict, nullcontext)


def lengths_of(made, draws, t, step):
    return made.rollout_steps(draws, t, step, Grid(made.grid, made.shift(8, 8)))


@every_path
@every_sampler
@pytest.mark.parametrize("grid", [28, "native"])
def test_exact_prediction_stays_on_the_path(path, sampler, grid):
    x0, batch, cond, t = rows()

    def oracle(x, now, cond):
        mine = cond["states"][:, 0, 0].long()
        return path.target(x0[mine], batch.eps[mine], now)

    at = make_rollout(config(f"rollout.sampler={sampler.value}", f"rollout.num_steps={grid}"), path, oracle)(
        x0, batch, cond, t, 5
    )
    assert at.rolled_out.any()
    assert_close(at.x_t, path.noise(x0, batch.eps, t), atol=1e-3, rtol=1e-3)
    assert_close(at.eps, batch.eps, atol=2e-2, rtol=2e-2)


@cache
def rollout_of(*words):
    """The default rollout without ramp, with these overrides."""
    return lab.compose("rollout.enabled=true", "rollout.ramp_steps=0", *words).rollout


def optimum_factor(path, t, variance, *words):
    """The factor by which a rollout scales the target x_0 of an exact denoiser of N(0, variance), at time t.

    Four samples (±√v, ±1) have the second moments of x_0 and ε exactly, once for each rollout length, and everything is
    linear; so the least-squares fit is exact as well.
    """
    cfg = rollout_of(*words)
    lengths = cfg.max_step_offset
    draws = torch.tensor([[0.0, (k + 0.5) / lengths] for k in range(lengths)], dtype=torch.float64).repeat_interleave(4, 0)
    x0 = (variance**0.5 * torch.tensor([1.0, 1.0, -1.0, -1.0])).repeat(lengths).view(-1, 1, 1, 1)
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat(lengths).view(-1, 1, 1, 1)

    def exact(x, now, cond):
        alpha, sigma = path.scales(now)
        spread = alpha**2 * variance + sigma**2
        return path.target(alpha * variance / spread * x, sigma / spread * x, now)

    t = torch.full((4 * lengths,), t, dtype=torch.float64)
    at = make_rollout(cfg, path, exact)(
        x0, SimpleNamespace(eps=eps, rollout_draws=draws), Cond(states=torch.zeros(4 * lengths, 1, 1)), t, 0
    )
    assert at.rolled_out.all()
    target, x = path.target(x0, at.eps, t), at.x_t
    best = (target * x).sum() / x.square().sum() * x
    right, _ = path.split(exact(x, t, None), x, t)
    return float((path.split(best, x, t)[0] / right).mean())


def predicted(path, t, variance, steps, number):
    """E_k[α_s/α_t √(V_t/V_s)] of rollout.py's docstring."""
    times = t + torch.arange(0, steps + 1, dtype=torch.float64) / number
    alpha, sigma = path.exact_scales(times)
    spread = alpha**2 * variance + sigma**2
    return float((alpha[1:] / alpha[0] * (spread[0] / spread[1:]).sqrt()).mean())


@every_path
@every_sampler
@pytest.mark.parametrize("variance", [0.5, 1.0, 2.0])
def test_default_rollout_keeps_an_exact_denoiser_at_its_optimum(path, sampler, variance):
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        factor = optimum_factor(path, t, variance, f"rollout.sampler={sampler.value}")
        assert factor == pytest.approx(1, abs=0.03)
        assert factor == pytest.approx(predicted(path, t, variance, 4, 1000), abs=2e-3)


@every_path
@pytest.mark.parametrize("variance", [0.5, 1.0, 2.0])
def test_long_rollouts_shift_the_optimum_by_the_documented_factor(path, variance):
    """Up to the solver's own error on such steps."""
    for t in (0.1, 0.3, 0.5, 0.7):
        for words, steps, number in ((("rollout.num_steps=28",), 4, 28), (("rollout.max_step_offset=10",), 10, 1000)):
            factor = optimum_factor(path, t, variance, "rollout.sampler=unipc", *words)
            assert factor == pytest.approx(predicted(path, t, variance, steps, number), rel=0.03)
    assert optimum_factor(path, 0.5, 1.0, "rollout.num_steps=28") < 0.9


def test_documented_factors_match_the_formula():
    """The factors in conf/rollout/default.yaml and in the docstring."""
    path, times = PATHS["epsilon"], (0.1, 0.5, 0.9)
    for steps, number, documented in (
        (4, 1000, (0.998, 0.994, 0.987)),
        (10, 1000, (0.996, 0.987, 0.972)),
        (4, 28, (0.93, 0.79, 0.66)),
    ):
        assert [predicted(path, t, 1.0, steps, number) for t in times] == pytest.approx(
            documented, abs=0.005 if number == 28 else 5e-4
        )
    original = optimum_factor(path, 0.5, 1.0, "rollout.num_steps=28", "rollout.sampler=unipc", "rollout.target=original")
    assert original == pytest.approx(0.82, abs=0.01)


@every_path
def test_corrected_target_points_to_the_clean_image(path):
    x0, batch, cond, t = rows()
    at = make_rollout(config("rollout.max_step_offset=8"), path)(x0, batch, cond, t, 5)
    assert (at.x_t - path.noise(x0, batch.eps, t))[at.rolled_out].abs().max() > 0.05, "this network does drift"
    back, _ = path.split(path.target(x0, at.eps, t), at.x_t, t)
    assert_close(back, x0, atol=1e-3, rtol=1e-3)
    original = make_rollout(config("rollout.max_step_offset=8", "rollout.target=original"), path)(x0, batch, cond, t, 5)
    assert torch.equal(original.eps, batch.eps) and torch.equal(original.x_t, at.x_t)


@every_path
@every_sampler
@pytest.mark.parametrize("off", ["rollout.probability=0", "rollout.min_time=1"])
def test_rollout_of_zero_steps_is_bit_identical_to_no_rollout(path, sampler, off):
    x0, batch, cond, t = rows()
    at = make_rollout(config(f"rollout.sampler={sampler.value}", off), path, None)(x0, batch, cond, t, 5)
    plain = NoRollout(path)(x0, batch, cond, t, 5)
    assert all(torch.equal(a, b) for a, b in zip(at, plain, strict=True))


@every_path
@every_sampler
def test_batched_rollout_matches_row_by_row_with_few_forward_passes(path, sampler):
    x0, batch, cond, t = rows()
    cfg, calls = config(f"rollout.sampler={sampler.value}"), []
    counted = make_rollout(cfg, path, lambda x, *a: calls.append(len(x)) or network(x, *a))
    at = counted(x0, batch, cond, t, 5)
    lengths = lengths_of(counted, batch.rollout_draws, t, 5)
    assert len(set(lengths.tolist())) > 2
    assert calls == [int((lengths > i).sum()) for i in range(int(lengths.max()))]
    for i in range(len(t)):
        one = SimpleNamespace(eps=batch.eps[i : i + 1], rollout_draws=batch.rollout_draws[i : i + 1])
        alone = make_rollout(cfg, path)(x0[i : i + 1], one, cond.select(torch.tensor([i])), t[i : i + 1], 5)
        assert_close(at.x_t[i : i + 1], alone.x_t, atol=1e-5, rtol=1e-5)
        assert_close(at.eps[i : i + 1], alone.eps, atol=1e-4, rtol=1e-4)


def test_rollout_lengths_are_uniform_and_start_below_the_maximum_time():
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    draws, t = torch.stack([torch.zeros_like(u), u], 1), torch.full_like(u, 0.5)
    made = make_rollout(config("rollout.max_step_offset=4"), PATHS["flow"])
    assert torch.bincount(lengths_of(made, draws, t, 0)).tolist() == [0, 1000, 1000, 1000, 1000]
    high = lengths_of(made, draws, torch.full_like(u, 1 - 2.5 / 28), 0)
    assert high.max() == 2, "there are two and a half steps up to pure noise"
    limited = make_rollout(config("rollout.max_step_offset=4"), PATHS["flow"], top=0.55)
    assert lengths_of(limited, draws, t, 0).max() == 1, "nor above the model's maximum training time"


@every_sampler
@pytest.mark.parametrize("grid", [28, "native"])
@pytest.mark.parametrize("shift", ["1.0", "3.0"])
def test_zero_terminal_snr_rollouts_do_not_start_at_pure_noise_and_are_finite(sampler, grid, shift):
    x0, batch, cond, _ = rows(8)
    t = torch.tensor([0.3, 0.9, 0.97, 0.995, 0.998, 0.9985, 0.99905, 0.99999], dtype=torch.float64)
    batch.rollout_draws = torch.tensor([[0.0, 0.99]] * 8, dtype=torch.float64)
    seen = []
    spy = lambda x, now, cond: seen.extend(now.tolist()) or network(x, now, cond)  # noqa: E731
    words = (
        f"rollout.sampler={sampler.value}",
        f"rollout.num_steps={grid}",
        f"rollout.shift={shift}",
        "rollout.max_step_offset=8",
    )
    made = make_rollout(config(*words), ZERO, spy)
    at = made(x0, batch, cond, t, 5)
    assert max(seen) <= ZERO.top + 1e-9 and ZERO.native(torch.tensor(seen)).max() <= 998
    assert at.x_t.isfinite().all() and at.eps.isfinite().all()
    length = lengths_of(made, batch.rollout_draws, t, 5)
    assert torch.equal(at.rolled_out, length > 0) and length.min() == 0 and length[0] == 8
    plain = NoRollout(ZERO)(x0, batch, cond, t, 5)
    assert torch.equal(at.x_t[~at.rolled_out], plain.x_t[~at.rolled_out]) and torch.equal(
        at.eps[~at.rolled_out], plain.eps[~at.rolled_out]
    )


def test_grid_shift_is_the_models_own_for_the_size_or_the_given_number():
    sizes = []
    x0, batch, cond, t = rows(1)
    batch.rollout_draws, t = torch.tensor([[0.0, 0.99]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)

    def starts(shift):
        seen = []
        spy = lambda x, now, cond: seen.append(float(now)) or network(x, now, cond)  # noqa: E731
        cfg = config("rollout.max_step_offset=2", "rollout.num_steps=10", f"rollout.shift={shift}")
        ModelRollout(cfg, PATHS["flow"], 1.0, lambda *size: sizes.append(size) or 3.0, spy, nullcontext)(x0, batch, cond, t, 0)
        return seen

    assert_close(starts("model"), [3 * u / (1 + 2 * u) for u in (0.45, 0.35)])
    assert sizes == [(8, 8)]
    assert_close(starts("1.0"), [0.7, 0.6])
    assert sizes == [(8, 8)]


def test_rollout_steps_match_inference_steps():
    seen = []
    x0, batch, cond, _ = rows(1)
    batch.rollout_draws = torch.tensor([[0.0, 0.99]], dtype=torch.float64)
    t = torch.tensor([0.5], dtype=torch.float64)
    spy = lambda x, now, cond: seen.append(float(now)) or network(x, now, cond)  # noqa: E731
    make_rollout(config("rollout.max_step_offset=3", "rollout.num_steps=10"), PATHS["flow"], spy)(x0, batch, cond, t, 0)
    assert_close(seen, [0.8, 0.7, 0.6])
    seen.clear()
    make_rollout(config("rollout.max_step_offset=3", "rollout.num_steps=native"), PATHS["epsilon"], spy)(x0, batch, cond, t, 0)
    assert PATHS["epsilon"].native(torch.tensor(seen, dtype=torch.float64)).tolist() == [503, 502, 501]
    seen.clear()
    make_rollout(config("rollout.max_step_offset=2", "rollout.num_steps=10", "rollout.shift=3"), PATHS["flow"], spy)(
        x0, batch, cond, t, 0
    )
    assert_close(seen, [3 * u / (1 + 2 * u) for u in (0.45, 0.35)])


def test_rollout_runs_without_gradient_in_eval_mode():
    x0, batch, cond, t = rows()
    weight, inside = torch.ones((), requires_grad=True), []

    class EvalMode:
        def __enter__(self):
            inside.append("in")

        def __exit__(self, *_):
            inside.append("out")

    def predict(x, now, cond):
        inside.append(torch.is_grad_enabled())
        return weight * network(x, now, cond)

    at = ModelRollout(config(), PATHS["flow"], 1.0, unshifted, predict, EvalMode)(x0, batch, cond, t, 5)
    assert not at.x_t.requires_grad and inside[0] == "in" and inside[-1] == "out" and set(inside[1:-1]) == {False}


@pytest.mark.parametrize(("shape", "quarter"), [(enums.Ramp.linear, 0.25), (enums.Ramp.cosine, 0.5 - 0.5 * 2**-0.5)])
def test_ramp_is_increasing(shape, quarter):
    values = [ramp(step, 0.8, 1000, shape) for step in (0, 250, 500, 1000, 5000)]
    assert_close(values, [0.0, 0.8 * quarter, 0.4, 0.8, 0.8])
    assert ramp(0, 0.8, 0, shape) == 0.8


def test_example_ramp_values_match():
    """max_step_offset 10, probability 1, ramp_steps 1000, unipc: from no rollout at all to every row."""
    cfg = lab.compose("rollout.enabled=true", "rollout.max_step_offset=10", "rollout.probability=1.0",
                      "rollout.ramp_steps=1000", "rollout.sampler=unipc").rollout  # fmt: skip
    made, t = make_rollout(cfg, PATHS["epsilon"]), torch.full((2000,), 0.5, dtype=torch.float64)
    draws = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = [(lengths_of(made, draws, t, step) > 0).double().mean().item() for step in (0, 250, 500, 750, 1000, 9000)]
    assert shares[0] == 0 and shares[-2:] == [1.0, 1.0] and shares == sorted(shares)
    assert_close(shares, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0], atol=0.03, rtol=0)


def test_rolled_out_rows_stay_rolled_out_as_the_ramp_rises():
    draws = torch.rand(64, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made, t = make_rollout(config("rollout.ramp_steps=1000"), PATHS["flow"]), torch.full((64,), 0.4, dtype=torch.float64)
    lengths = torch.stack([lengths_of(made, draws, t, step) for step in range(0, 2000, 50)])
    before, after = lengths[:-1], lengths[1:]
    assert ((before == 0) | (before == after)).all() and (before != after).any()


@every_path
def test_input_perturbation_noise_is_not_part_of_the_target(path):
    x0, batch, cond, t = rows()
    made = InputPerturbation(
        config("rollout.kind=input_perturbation", "rollout.probability=0.5", "rollout.perturbation=0.3"), path
    )
    at = made(x0, batch, cond, t, 0)
    assert (
        torch.equal(at.eps, batch.eps)
        and torch.equal(at.rolled_out, batch.rollout_draws[:, 0] < 0.5)
        and 0 < at.rolled_out.sum() < 6
    )
    assert_close(at.x_t[at.rolled_out], path.noise(x0, batch.eps + 0.3 * batch.xi, t)[at.rolled_out])
    assert torch.equal(at.x_t[~at.rolled_out], path.noise(x0, batch.eps, t)[~at.rolled_out])


def test_build_rollout_returns_the_configured_kind():
    made = [build_rollout(lab.compose(*words).rollout, PATHS["flow"], 1.0, unshifted, network, nullcontext)
            for words in ([], ["rollout.enabled=true"], ["rollout.enabled=true", "rollout.kind=input_perturbation"])]  # fmt: skip
    assert [type(m) for m in made] == [NoRollout, ModelRollout, InputPerturbation]


def test_reflexflow_direction_points_to_the_clean_image():
    x0, batch, _, t = rows()
    path = PATHS["flow"]
    x_t = path.noise(x0, batch.eps, t) + 0.3 * batch.xi
    rolled_out = torch.tensor([True, True, False, True, False, True])
    terms = ReflexFlow(10.0, 0.0, path, network)
    assert_close(terms.direction_loss(7 * (x_t - x0), x_t, x0, rolled_out, None), torch.zeros(6), atol=1e-5, rtol=0)
    away = terms.direction_loss(-(x_t - x0), x_t, x0, rolled_out, None)
    assert_close(away, 40.0 * rolled_out.float()), "opposite unit vectors are 2 apart"
    v = (x_t - x0).clone().requires_grad_()
    mask = torch.zeros(6, 1, 8, 8)
    mask[..., :4] = 1
    terms.direction_loss(v + batch.xi, x_t, x0, rolled_out, mask).sum().backward()
    assert v.grad[2].abs().sum() == 0 < v.grad[0].abs().sum()
    assert v.grad[..., 4:].abs().sum() == 0, "the direction term is masked"


def test_reflexflow_frequency_weight_follows_the_drift():
    x0, batch, cond, t = rows()
    path, rolled_out = PATHS["flow"], torch.tensor([True] * 3 + [False] * 3)
    at = path.noise(x0, batch.eps, t)
    drift = torch.zeros_like(at)
    drift[..., :2] = 0.5
    weight = ReflexFlow(0.0, 2.0, path, network).frequency_weight(network(at + drift, t, cond), batch, cond, t, rolled_out)
    assert torch.equal(weight[3:], torch.ones(3, 4, 8, 8)) and torch.equal(weight[:3, ..., 2:], torch.ones(3, 4, 8, 6))
    assert (weight[:3, ..., :2] > 1).all()
    assert_close(weight[:3].mean((1, 2, 3)), torch.full((3,), 3.0))


def test_reflexflow_requires_a_flow_model():
    cfg = config("rollout.reflexflow.direction=10")
    assert build_reflexflow(cfg, PATHS["flow"], network) is not None
    assert build_reflexflow(config(), PATHS["epsilon"], network) is None
    with pytest.raises(ConfigError, match="does not predict a flow's velocity"):
        build_reflexflow(cfg, PATHS["epsilon"], network)
