"""The best checkpoint is kept beside the newest; early stopping."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

import tiny
from dreambooth_lab import lab
from dreambooth_lab.callbacks.checkpoint import Best
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.run import run
from dreambooth_lab.runfolder import RunFolder


def watch(values, tmp_path, mode=enums.Mode.min, patience=0):
    """Call a Best with these values, one per step; returns it, its trainer and the steps it kept."""
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir(exist_ok=True)
    numbers = SimpleNamespace(newest={})
    best = Best(OmegaConf.create({"monitor": "eval/loss", "mode": mode, "patience": patience}), folder, numbers, MagicMock())
    trainer = MagicMock(should_stop=False, is_global_zero=True)
    trainer.strategy.broadcast.side_effect = lambda message: message
    trainer.save_checkpoint.side_effect = lambda path: path.write_text("")
    kept = []
    for step, value in enumerate(values, 1):
        numbers.newest["eval/loss"] = (step, value)
        best.on_train_batch_end(trainer, MagicMock(), None, None, 0)
        kept.append(folder.best()[1] if folder.best() else None)
        if trainer.should_stop:
            break
    return best, trainer, kept


def test_only_the_first_best_checkpoint_is_kept(tmp_path):
    best, trainer, kept = watch([3.0, 1.0, 2.0, 1.0, 0.5, float("nan")], tmp_path)
    assert kept == [1, 2, 2, 2, 5, 5] and not trainer.should_stop and best.value == 0.5
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1


def test_mode_max_and_all_nan_values(tmp_path):
    assert watch([0.1, 0.3, 0.2], tmp_path / "a", enums.Mode.max)[2] == [1, 2, 2]
    assert watch([float("nan")] * 2, tmp_path / "b")[2] == [None, None]


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()


def test_training_stops_after_patience_values_without_improvement(tmp_path):
    _, trainer, kept = watch([3.0, 2.0, 2.5, 1.9, 2.0, 2.1, 0.1], tmp_path, patience=2)
    assert trainer.should_stop and len(kept) == 6 and kept[-1] == 4


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """A run with a huge learning rate, which only gets worse after its first evaluation."""
    root = tmp_path_factory.mktemp("best")
    held_out = tiny.save_photos(root / "held", [(80, 80)], seed=7)
    words = [f"eval.path={held_out}", "eval.every_n_steps=2", "eval.timesteps=2", "checkpoint.monitor=eval/loss",
             "checkpoint.patience=2", "trainer.max_steps=60", "optimizer.lr=0.3", "checkpoint.every_n_steps=50",
             "validation.every_n_steps=50"]  # fmt: skip
    run(lab.compose(*small, *words), root / "run")
    return lab.load(root / "run")


def test_worsening_run_stops_and_keeps_its_best_step(stopped):
    values = dict(stopped.series["eval/loss"])
    after = {step: value for step, value in values.items() if step}
    best = min(after, key=after.get)
    assert stopped.steps == best + 4 < 60, "two values of two steps each"
    assert stopped.folder.best()[1] == best and stopped.folder.newest()[1] == stopped.steps
    assert sorted(stopped.images) == [0, stopped.steps], "the last validation images are of the step where it stopped"
    assert torch.load(stopped.folder.best()[0], weights_only=True)["global_step"] == best
    for export, step in ((stopped.folder.best_export, best), (stopped.folder.export, stopped.steps)):
        with safe_open(export / "pytorch_lora_weights.safetensors", "pt") as file:
            assert file.metadata()["steps"] == str(step)
    assert "Kept because eval/loss was lowest here" in (stopped.folder.best_export / "README.md").read_text()
    assert "Kept because" not in (stopped.folder.export / "README.md").read_text()
    assert f"keep step {best:,}" in stopped.folder.report.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint.patience=3"], "checkpoint.patience is 3, but nothing is monitored"),
        (["checkpoint.monitor=loss"], "which is not a logged metric; they start with train/"),
        (["checkpoint.monitor=eval/loss"], "which needs eval images"),
        (["checkpoint.monitor=clip/mean"], "which needs eval.clip_model"),
        (["checkpoint.monitor=train/loss", "checkpoint.mode=max"], "a loss; use min"),
        (["checkpoint.monitor=ema/eval/loss", "eval.path=."], "but only the live weights are evaluated"),
        (["checkpoint.monitor=eval/loss", "eval.path=.", "ema.validation=ema_only"], "but not the live weights are evaluated"),
        (["checkpoint.monitor=train/loss_prior", "prior=none", "prior.path=null"], "but prior is none"),
        (["logger=wandb", "logger.loggers.wandb.package=no_such_package"], "pip install no_such_package"),
        (["logger=csv", "logger.loggers.csv._target_=CSVLogger"], "it must name a class"),
    ],
)
def test_invalid_monitor_settings_are_refused(small, words, message):
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*small, *words))
    assert message in str(caught.value)


def test_unknown_metric_is_refused_with_similar_names(small, tmp_path):
    with pytest.raises(ConfigError, match=r"'train/los', which this run does not log; similar: train/loss"):
        run(lab.compose(*small, "checkpoint.monitor=train/los", "validation.every_n_steps=0"), tmp_path / "run")
