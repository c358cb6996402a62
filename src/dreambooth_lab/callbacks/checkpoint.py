"""Checkpoints for bit-exact resuming: trainable weights, optimiser, EMA, position in the data."""

from __future__ import annotations

import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from ..config import ConfigError, RunError, enums
from ..dreambooth import DreamBooth
from ..runfolder import PART, RunFolder
from ..storage import durable
from .export import Export
from .finite import require_finite
from .metrics import NAMES, MetricsFile

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint atomically, after syncing it to the disk and verifying it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        part = target.with_name(target.name + PART)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(checkpoint, part)
            if not durable.is_complete_archive(part):
                raise RunError(f"{target} can't be read back correctly; the disk is full or failing")
            durable.replace_file(part, target)
        finally:
            part.unlink(missing_ok=True)


class Checkpoints(Callback):
    """Saves every n optimiser steps and at the last one. Must come after all callbacks with a state, so that it is up to date.

    Args:
        keep: how many of the newest are kept; None: all.
    """

    def __init__(self, folder: RunFolder, every_n_steps: int, keep: int | None):
        self.folder, self.every_n_steps, self.keep = folder, every_n_steps, keep
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        last = step == trainer.max_steps or trainer.should_stop
        if step == self.step or (step % self.every_n_steps and not last):
            return
        self.save(trainer, pl_module)

    def save(self, trainer: Trainer, module: LightningModule) -> None:
        """Save the current state; older checkpoints are removed when it is complete."""
        assert isinstance(module, DreamBooth)
        require_finite(module.trainable_parameters(), trainer.global_step)
        self.step = trainer.global_step
        trainer.save_checkpoint(self.folder.checkpoint(self.step))
        kept = self.folder.all_checkpoints()
        for path in kept[: -self.keep] if self.keep and trainer.is_global_zero else []:
            path.unlink()


class Best(Callback):
    """Keeps the checkpoint and the export of the step at which a logged metric was best, and stops when it no longer improves.

    The base model's value (step 0) is not a candidate, since there is nothing to save. Among equal values the first one is kept.

    Args:
        cfg: `monitor`, `mode`, `patience`.
        numbers: the newest value of every metric; callbacks that log must come before this one. None on all ranks but the first,
            which broadcasts the decision.
        export: None on all ranks but the first.
    """

    def __init__(self, cfg: DictConfig, folder: RunFolder, metrics: MetricsFile | None, export: Export | None):
        self.monitor, self.mode, self.patience = cfg.monitor, cfg.mode, cfg.patience
        self.folder, self.metrics, self.export = folder, metrics, export
        self.value: float | None = None  # the best so far
        self.seen = 0  # step of the newest value
        self.worse = 0  # values since the best one

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.strategy.broadcast(list(self.metrics.newest) if self.metrics else [])
        known = sorted({*NAMES.values(), "train/lr", *logged})
        if self.monitor not in known:
            near = get_close_matches(self.monitor, known, n=3)
            way_out = f"similar: {', '.join(near)}" if near else f"it logs {', '.join(known)}"
            raise ConfigError(f"checkpoint.monitor is {self.monitor!r}, which this run does not log; {way_out}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        newest = self.metrics.newest.get(self.monitor) if self.metrics else None
        step, value = trainer.strategy.broadcast(newest) or (0, 0.0)
        if step <= self.seen:
            return
        self.seen = step
        if self._better(value):
            self.value, self.worse = value, 0
            self._keep(trainer, pl_module, step)
            return
        self.worse += 1
        if self.patience and self.worse >= self.patience:
            log.info("stopping at step %d: %s has not improved for %d values", step, self.monitor, self.worse)
            trainer.should_stop = True

    def _better(self, value: float) -> bool:
        if self.value is None:
            return value == value
        return value < self.value if self.mode is enums.Mode.min else value > self.value

    def _keep(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        older = list(self.folder.checkpoints.glob("best_*.ckpt"))
        newest = self.folder.best_checkpoint(step)
        trainer.save_checkpoint(newest)
        word = "lowest" if self.mode is enums.Mode.min else "highest"
        why = f"Kept because {self.monitor} was {word} here: {self.value:.6g}."
        if self.export:
            self.export.write(module, step, self.folder.best_export, why)
        for path in older if trainer.is_global_zero else []:
            if path != newest:
                path.unlink()

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode.value, "value": self.value, "seen": self.seen, "worse": self.worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (state["monitor"], state["mode"]) == (self.monitor, self.mode.value):  # else another metric is monitored from now on
            self.value, self.seen, self.worse = state["value"], state["seen"], state["worse"]
