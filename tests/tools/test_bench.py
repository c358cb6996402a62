from __future__ import annotations

from contextlib import nullcontext

import pytest
from typer.testing import CliRunner

import published
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family
from dreambooth_lab.profiling import memory
from dreambooth_lab.tools.bench import plan
from dreambooth_lab.tools.bench.__main__ import app

BF16 = ["model.dtype=bfloat16", "trainer.accelerator=cpu"]


def test_fake_tensor_counts_match_a_real_step(small):
    cfg = lab.compose(*small, *BF16)
    fake = plan.analyse(cfg, 2, 64)
    family, adapter = build_family(cfg), build_adapter(cfg)
    text = family.encode_text([plan.CAPTION])
    layers = attach(cfg, family, adapter, None)
    module = DreamBooth(cfg, family, adapter)
    inputs = memory.probe(module, text, 64 // family.factor, 64 // family.factor, 2)
    saved, meter = plan._run(module, lambda: module.predict(*inputs), nullcontext())
    assert fake.layers == len(layers) and fake.saved == saved
    assert (fake.meter.flops, fake.meter.peak) == (meter.flops, meter.peak)
    assert fake.frozen == memory.stored(p for p in module.parameters() if not p.requires_grad)
    assert fake.learning == sum(p.numel() for p in module.trainable_parameters().values())


@pytest.mark.slow
def test_cost_grows_with_image_size_and_checkpointing_reduces_memory(small):
    one, four = (plan.analyse(lab.compose(*small, *BF16), rows, 64) for rows in (1, 4))
    assert four.meter.flops.total() == pytest.approx(4 * one.meter.flops.total(), rel=0.05)
    assert 3 * one.saved < four.saved < 4.5 * one.saved
    again = plan.analyse(lab.compose(*small, *BF16, "model.gradient_checkpointing=true"), 4, 64)
    assert again.saved < four.saved and again.meter.flops.total() > four.meter.flops.total()


def test_weights_are_not_needed(small, tmp_path):
    folder = published.outline("sd15", tmp_path / "sd15")
    words = ["model=sd15", f"model.pretrained={folder}", *BF16]
    step = plan.analyse(lab.compose(*words), 1, 128)
    assert step.frozen == pytest.approx(2 * 0.8595e9, rel=0.001) and step.layers == 160
    with pytest.raises(ConfigError, match="has no weight files"):
        build_family(lab.compose(*words))


@pytest.mark.parametrize(
    ("word", "message"),
    [("quant=int8", "quant=none"), ("adapter.train_token=true", "leave them out"), ("model.compile=true", "set it to false")],
)
def test_invalid_plans_are_refused(small, word, message):
    result = CliRunner().invoke(app, ["--plan", *small, word])
    assert isinstance(result.exception, ConfigError) and message in str(result.exception)


def test_command_measures_and_plans(small):
    measured = CliRunner().invoke(app, ["--steps", "2", *small])
    assert measured.exit_code == 0 and "images / s" in measured.output and "peak memory" in measured.output
    beside = CliRunner().invoke(app, ["--steps", "1", "--against_autocast", *small, *BF16])
    assert beside.exit_code == 0 and "of autocast's" in beside.output
    planned = CliRunner().invoke(app, ["--plan", "--side", "64", *small, *BF16])
    assert planned.exit_code == 0 and "least time, H100" in planned.output and "ratio" in planned.output


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_sdxl_moves_fewer_bytes_than_under_autocast(rows, tmp_path):
    """Three quarters of the memory and two thirds of the time, at the published size and 1024 px."""
    words = ["model=sdxl", f"model.pretrained={published.outline('sdxl', tmp_path / 'sdxl')}", *BF16, "adapter.rank=16"]
    ours, theirs = (plan.analyse(lab.compose(*words), rows, 1024, as_peers=peers) for peers in (False, True))
    assert ours.layers == 700
    assert ours.saved <= 0.78 * theirs.saved
    assert ours.meter.seconds["H100"] <= 0.67 * theirs.meter.seconds["H100"]
