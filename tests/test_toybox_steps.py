"""Training steps on the toybox have the recorded losses: refactoring does not change results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dreambooth_lab import lab
from dreambooth_lab.run import run

RECORDED = json.loads((Path(__file__).parent / "toybox_steps.json").read_text())["losses"]
COMMON = ["trainer.max_steps=20", "validation.every_n_steps=0", "trainer.progress=false", "logger=none",
          "trainer.accelerator=cpu", "prior.path=${package:toybox/pictures/classes/robot}", "optimizer.lr=1e-3"]  # fmt: skip
RUNS = {
    "plain": ["prior=teacher", "rollout.enabled=true", "rollout.ramp_steps=0", "rollout.probability=0.5", "rollout.num_steps=28"],
    "token": ["prior=teacher", "adapter.train_token=true"],
    "bank": ["prior=bank", "adapter=dora", "dataset.caption_dropout=0.3", "objective.weight=min_snr"],
}


@pytest.mark.parametrize("kind", [kind if kind == "plain" else pytest.param(kind, marks=pytest.mark.slow) for kind in RUNS])
def test_losses_match_the_recorded_values(kind, tmp_path):
    run(lab.compose(*COMMON, *RUNS[kind], f"cache={tmp_path / 'cache'}"), tmp_path / "run")
    losses = [loss for _, loss in sorted(lab.load(tmp_path / "run").series["train/loss"])]
    assert losses == pytest.approx(RECORDED[kind], rel=1e-4), "other processors round differently, but no more than so"
