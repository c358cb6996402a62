"""The callbacks of a run, built from its configuration."""

from __future__ import annotations

from math import floor

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.factory import build_family
from dreambooth_lab.run import run


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("watching")
    held = tiny.save_photos(root / "held", [(80, 80)], seed=7)
    words = ["logger=[csv,tensorboard]", "validation.every_n_steps=0", "validation.every_n_epochs=0.8", f"eval.path={held}",
             "eval.every_n_steps=0", "eval.every_n_epochs=0.5", "eval.timesteps=2", "trainer.max_steps=9"]  # fmt: skip
    run(lab.compose(*small, *words), root / "run")
    return lab.load(root / "run")


def test_fractional_epochs_use_the_runs_own_epoch_length(done):
    data = DreamBoothData(done.config, build_family(done.config))
    data.prepare()
    epoch = data.schedule.batches_per_epoch

    def due(share):
        laps = [floor(step / (share * epoch) + 1e-9) for step in range(10)]
        return [0, *sorted({step for step in range(1, 10) if laps[step] > laps[step - 1]} | {9})]

    assert sorted(done.images) == due(0.8) and [step for step, _ in done.series["eval/loss"]] == due(0.5)
    assert len(due(0.8)) < len(due(0.5)) < 10


def test_loggers_receive_metrics_and_images_if_supported(done):
    events = EventAccumulator(str(done.folder.root / "tensorboard")).Reload()
    seen = {name: [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert seen == done.series
    assert [image.step for image in events.Images("images/live")] == sorted(done.images)
    table = (done.folder.root / "csv" / "version_1" / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "eval/loss"} <= set(table[0].split(",")) and len(table) > 9


def test_missing_logger_is_refused_with_the_package_to_install(small, monkeypatch):
    from dreambooth_lab.config import monitoring_rules

    monkeypatch.setattr(monitoring_rules, "installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"wandb\.package is 'wandb', which is not installed; pip install wandb"):
        check(lab.compose(*small, "logger=wandb"))
