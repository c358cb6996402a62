"""Training in bfloat16: rounding is unbiased, small updates accumulate, a resumed run rounds the same."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dreambooth_lab import lab, rounding
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.optimizer import Rate, build_optimizer

ABLE = ("adamw", "adamw8bit", "adafactor", "lion")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mean_of_rounded_values_equals_the_value():
    x = torch.tensor([1.0003, -1.0003, 3.14159, 1e-12, -7e5, 0.0, 2.0])
    draws = rounding.rounded(x.repeat(40_000, 1), torch.bfloat16, generator()).float()
    assert draws.dtype is torch.float32 and all(len(set(column.tolist())) <= 2 for column in draws.T)
    step = (draws.max(0).values - draws.min(0).values).clamp(min=1e-30)
    assert ((draws.mean(0) - x).abs() <= 5 * step / 2 / 40_000**0.5 + 1e-7 * x.abs()).all()
    assert torch.equal(draws[:, 5:].unique(dim=0), torch.tensor([[0.0, 2.0]])), "representable values are unchanged"


def test_nonfinite_values_and_float32_are_unchanged():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert_close(rounding.rounded(x, torch.bfloat16, generator()).float(), x, equal_nan=True)
    y = torch.randn(9)
    assert rounding.rounded(y, torch.float32, generator()) is y


def made(name, dtype, *words, seed=0):
    cfg = lab.compose("dataset.path=.", f"optimizer={name}", "optimizer.lr=1e-4", "optimizer.weight_decay=0", *words)
    weights = {"w": nn.Parameter(torch.ones(64, 64, dtype=dtype)), "b": nn.Parameter(torch.ones(40, dtype=dtype))}
    return weights, build_optimizer(cfg.optimizer, weights, {name: Rate(1.0, True) for name in weights}, seed)


def steps(weights, optimizer, n):
    for _ in range(n):
        for p in weights.values():
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize("name", ABLE)
def test_updates_below_bfloat16_resolution_accumulate_as_in_float32(name, monkeypatch):
    monkeypatch.setattr(rounding, "AT_ONCE", 100)  # per parameter
    (low, low_optimizer), (full, full_optimizer) = made(name, torch.bfloat16), made(name, torch.float32)
    steps(low, low_optimizer, 30)
    steps(full, full_optimizer, 30)
    moved = 1 - full["w"].mean().item()
    assert moved > 1e-4 and all(p.dtype is torch.bfloat16 and p.grad.dtype is torch.bfloat16 for p in low.values())
    assert 1 - low["w"].float().mean().item() == pytest.approx(moved, rel=0.1)


@pytest.mark.parametrize("name", ABLE)
def test_resumed_optimizer_continues_bit_for_bit(name):
    whole, optimizer = made(name, torch.bfloat16)
    steps(whole, optimizer, 4)
    buffer = io.BytesIO()
    torch.save({"model": whole, "optimizer": optimizer.state_dict()}, buffer)
    steps(whole, optimizer, 3)
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    again, other = made(name, torch.bfloat16)
    for key, p in again.items():
        p.data.copy_(saved["model"][key])
    other.load_state_dict(saved["optimizer"])
    steps(again, other, 3)
    assert all(torch.equal(again[key], p) for key, p in whole.items())


def test_rounding_depends_on_the_seed_and_step_calls_its_closure():
    ends = []
    for seed in (0, 0, 1):
        weights, optimizer = made("adamw", torch.bfloat16, seed=seed)
        for p in weights.values():
            p.grad = torch.ones_like(p)
        assert optimizer.step(lambda: "loss") == "loss"
        steps(weights, optimizer, 3)
        ends.append(weights["w"].detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_float32_parameters_use_the_plain_optimizer_class():
    assert type(made("adamw", torch.float32)[1]) is torch.optim.AdamW


@pytest.mark.parametrize("name", ["prodigy", "schedulefree"])
def test_optimizers_without_stochastic_rounding_are_refused(name):
    prompt = "dataset.instance_prompt=a photo of ohwx dog"
    cfg = lab.compose("dataset.path=.", prompt, "adapter=full", f"optimizer={name}", "ema.enabled=false")
    check(cfg)
    cfg.model.dtype = "bfloat16"
    with pytest.raises(ConfigError, match=r"can't be rounded stochastically; use optimizer=adamw"):
        check(cfg)


def test_float16_is_refused():
    with pytest.raises(ConfigError, match=r"model\.dtype is float16.*bfloat16"):
        check(lab.compose("dataset.path=.", "model.dtype=float16"))


def test_full_fine_tuning_has_its_own_learning_rate():
    rates = {name: lab.compose("dataset.path=.", f"adapter={name}").optimizer.lr for name in ("full", "lora", "oft")}
    assert 1e-6 <= rates["full"] <= 5e-6 and rates["lora"] == rates["oft"] > rates["full"]
    assert lab.compose("dataset.path=.", "adapter=full", "model.recommended.lr_full=3e-6").optimizer.lr == 3e-6
    lion = [lab.compose("dataset.path=.", f"adapter={name}", "optimizer=lion").optimizer.lr for name in ("full", "lora")]
    assert lion == pytest.approx([0.3 * rates["full"], 0.3 * rates["lora"]])
