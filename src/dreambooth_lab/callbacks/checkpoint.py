"""Checkpoints from which a run goes on bit for bit: what learns, the optimiser, the averages, the place in the data."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..runfolder import RunFolder


class Checkpoints(Callback):
    """Saves every n optimiser steps and at the last one. Comes last of the callbacks, so that they are all up to date.

    Args:
        keep_all: False removes the older one once the newer one is whole.
    """

    def __init__(self, folder: RunFolder, every_n_steps: int, keep_all: bool):
        self.folder, self.every_n_steps, self.keep_all = folder, every_n_steps, keep_all
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.step or (step % self.every_n_steps and step != trainer.max_steps):
            return
        self.step = step
        older = list(self.folder.checkpoints.glob("step_*.ckpt"))
        newest = self.folder.checkpoint(step)
        trainer.save_checkpoint(newest)
        for path in older if trainer.is_global_zero and not self.keep_all else []:
            if path != newest:
                path.unlink()
