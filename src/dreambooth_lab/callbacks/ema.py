"""An exponential moving average of the trainable weights (Polyak averaging)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..adapter import temporarily_replaced
from ..config import enums
from ..dreambooth import DreamBooth


class Ema(Callback):
    """θ̄ ← d θ̄ + (1 - d) θ over the trainable parameters only, in float32, on its own device.

    From a CUDA device to the CPU the weights are copied to page-locked memory while the next step is computed, and are added at
    the next use; the average takes no device memory.

    Args:
        decay: d per optimiser step, once warmed up; at step s it is min(d, (1+s)/(10+s)).
        update_interval: optimiser steps k between updates; d is raised to the power k, so the average's length in steps
            does not depend on it.
        device: where θ̄ lives.
    """

    def __init__(self, decay: float, update_interval: int, device: str):
        self.decay, self.interval, self.device = decay, update_interval, torch.device(device)
        self.shadow: dict[str, Tensor] = {}
        self.staged: dict[str, Tensor] = {}  # weights being copied
        self.arrival: torch.cuda.Event | None = None  # when the copy is complete
        self.share: float | None = None  # 1 - d for adding them; None: no copy is pending
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DreamBooth)
        if not self.shadow:
            self.shadow = {
                name: p.detach().to(self.device, torch.float32, copy=True) for name, p in pl_module.trainable_parameters().items()
            }

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, DreamBooth)
        step = trainer.global_step
        if step == self.step or step % self.interval:
            return
        self.step = step
        self.average()
        self.share = 1 - self.decay_at(step)
        self.arrival = self._send(pl_module.trainable_parameters())
        if self.arrival is None:
            self.average()

    def decay_at(self, step: int) -> float:
        """d^k at a step."""
        return min(self.decay, (1 + step) / (10 + step)) ** self.interval

    def _send(self, learning: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        """Copy the weights to the average's device; None if the copy is synchronous."""
        if self.device.type == "cuda" or not all(learning[name].is_cuda for name in self.shadow):
            self.staged = {name: learning[name].detach().to(self.device, torch.float32) for name in self.shadow}
            return None
        if not self.staged:
            self.staged = {name: torch.empty_like(p, device="cpu", pin_memory=True) for name, p in learning.items()}
        for name, buffer in self.staged.items():
            buffer.copy_(learning[name].detach(), non_blocking=True)  # in the order of the stream: before the next step's update
        arrival = torch.cuda.Event()
        arrival.record()
        return arrival

    def average(self) -> dict[str, Tensor]:
        """θ̄ by parameter name, including pending copies."""
        if self.share is not None:
            if self.arrival:
                self.arrival.synchronize()
            live = [self.staged[name].float() for name in self.shadow]
            torch._foreach_lerp_(list(self.shadow.values()), live, self.share)
            self.share = None
        return self.shadow

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.average(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = {name: average.to(self.device) for name, average in state["shadow"].items()}
        self.step = state["step"]


LIVE, EMA = "live", "ema"  # the weights of an image or a metric
PREFIX = {LIVE: "", EMA: "ema/"}  # of the names of metrics
KINDS = {enums.EmaValidation.none: (LIVE,), enums.EmaValidation.ema_only: (EMA,), enums.EmaValidation.comparison: (LIVE, EMA)}


class EvalWeights:
    """The weights to evaluate: the live ones, their average, or both.

    Args:
        ema: the run's average; None: only the live weights.
    """

    def __init__(self, ema: Ema | None, validation: enums.EmaValidation):
        self.ema = ema
        self.kinds = KINDS[validation] if ema else (LIVE,)

    def at_step(self, step: int) -> list[tuple[str, tuple[str, ...]]]:
        """The weights to evaluate, each with all weights for which the result holds: at step 0 all equal the base model."""
        return [(LIVE, self.kinds)] if step == 0 else [(kind, (kind,)) for kind in self.kinds]

    @contextmanager
    def __call__(self, module: DreamBooth, kind: str) -> Iterator[None]:
        """A context in which the module has these weights."""
        with (
            temporarily_replaced(module.trainable_parameters(), self.ema.average()) if self.ema and kind == EMA else nullcontext()
        ):
            yield
