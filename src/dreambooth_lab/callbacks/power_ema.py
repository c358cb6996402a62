"""Power-function averages of the trainable weights, and snapshots of them: the averaging length is chosen after training."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file

from ..power_average import beta, gamma_of
from ..runfolder import PART, RunFolder
from ..storage import durable
from .ema import Ema
from .finite import require_finite


class PowerEma(Ema):
    """The average of one length (see `power_average`), on the CPU, with a snapshot in half precision every n steps and the last.

    Args:
        length: σ_rel.
        interval: optimiser steps between updates.
    """

    def __init__(self, length: float, interval: int, every_n_steps: int, folder: RunFolder):
        super().__init__(decay=0.0, update_interval=interval, device="cpu")
        self.length, self.gamma, self.every_n_steps, self.folder = length, gamma_of(length), every_n_steps, folder

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__} {self.length:g}"

    def decay_at(self, step: int) -> float:
        return beta(step, self.gamma, self.interval)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        before = self.step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last = self.step == trainer.max_steps or trainer.should_stop
        if self.step != before and (self.step % self.every_n_steps == 0 or last) and trainer.is_global_zero:
            self._save()

    def _save(self) -> None:
        path = self.folder.snapshot(self.step, self.length)
        path.parent.mkdir(exist_ok=True)
        weights = self.average()
        require_finite(weights, self.step)
        part = path.with_name(path.name + PART)
        save_file({name: weight.to(torch.float16).contiguous() for name, weight in weights.items()}, part)
        durable.replace_file(part, path)
