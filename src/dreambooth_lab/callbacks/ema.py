"""An exponential moving average of what learns (Polyak averaging)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..dreambooth import DreamBooth


class Ema(Callback):
    """θ̄ ← d θ̄ + (1 - d) θ over the trainable parameters only, in float32, on its own device.

    Args:
        decay: d per optimiser step, once warmed up; at step s it is min(d, (1+s)/(10+s)).
        update_interval: optimiser steps k between updates; d is raised to the power k, so the average's length in steps
            does not depend on it.
        device: where θ̄ lives.
    """

    def __init__(self, decay: float, update_interval: int, device: str):
        self.decay, self.interval, self.device = decay, update_interval, torch.device(device)
        self.shadow: dict[str, Tensor] = {}
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DreamBooth)
        if not self.shadow:
            self.shadow = {name: p.detach().to(self.device, torch.float32, copy=True) for name, p in pl_module.learning().items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, DreamBooth)
        step = trainer.global_step
        if step == self.step or step % self.interval:
            return
        self.step = step
        decay = min(self.decay, (1 + step) / (10 + step)) ** self.interval
        learning = pl_module.learning()
        live = [learning[name].detach().to(self.device, torch.float32) for name in self.shadow]
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = {name: average.to(self.device) for name, average in state["shadow"].items()}
        self.step = state["step"]
