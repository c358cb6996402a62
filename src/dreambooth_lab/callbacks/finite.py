"""Stops a diverged run at the first step with a non-finite loss or gradient; files saved before are kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..batch import Batch
from ..config import RunError
from ..dreambooth import DreamBooth
from .async_read import Event, read, record_event

log = logging.getLogger(__name__)
WAY_OUT = "lower optimizer.lr, or set trainer.gradient_clip_norm"


class Finite(Callback):
    """Checks the loss of every micro-batch and the gradient of every optimiser step.

    On a CPU, or if steps may be skipped, a step is checked before it is applied. On an accelerator this would require a
    synchronisation, so it is checked before the next step, while queued work runs. Then the weights in memory are lost,
    but not those on the disk, since non-finite weights are never saved. This is the only value that is read in every step;
    reading it later would continue training with lost weights.

    Args:
        allowed: how many steps may be skipped.
    """

    def __init__(self, allowed: int):
        self.allowed, self.skipped = allowed, 0
        self.captions: list[str] = []  # of the optimiser step
        self.bad: Tensor | None = None  # [], whether a value of the current step is not finite
        self.before: tuple[Tensor, Event, int, list[str]] | None = (
            None  # the same for the previous step, with its number and captions
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.captions += batch.captions

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._add(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, DreamBooth)
        self._add(get_total_norm([p.grad for p in pl_module.trainable_parameters().values() if p.grad is not None]))
        assert self.bad is not None
        now = self.bad, record_event(self.bad), trainer.global_step + 1, self.captions
        self.bad, self.captions = None, []
        if self.allowed or not now[0].is_cuda:
            if self._is_bad(*now):
                optimizer.zero_grad()  # a parameter without a gradient is not changed
            return
        if self.before:
            self._is_bad(*self.before)
        self.before = now

    def _add(self, value: Tensor) -> None:
        bad = ~value.detach().isfinite()
        self.bad = bad if self.bad is None else self.bad | bad

    def _is_bad(self, bad: Tensor, known: Event, step: int, captions: Iterable[str]) -> bool:
        """
        Raises:
            RunError: the step is not finite, and no more steps may be skipped.
        """
        if not read([bad], known).item():
            return False
        prefix = f"the loss or the gradient of step {step} is not finite (captions: {'; '.join(sorted(set(captions)))})"
        self.skipped += 1
        if self.skipped > self.allowed:
            allowed = f", and trainer.skip_nonfinite_steps={self.allowed} were skipped before" if self.allowed else ""
            raise RunError(f"{prefix}{allowed}; the earlier checkpoint and export are kept; {WAY_OUT}")
        log.warning("%s; skipped, %d of at most %d", prefix, self.skipped, self.allowed)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]


class UnchangedWeights(Callback):
    """Warns if training has changed no weight by the first save."""

    def __init__(self, every_n_steps: int):
        self.every_n_steps = every_n_steps
        self.start: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DreamBooth)
        self.start = _norms(pl_module.trainable_parameters()) if trainer.global_step == 0 else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, DreamBooth)
        step = trainer.global_step
        if self.start is None or step == 0 or (step % self.every_n_steps and step != trainer.max_steps):
            return
        if torch.equal(self.start, _norms(pl_module.trainable_parameters())):
            log.warning("no weight has changed in %d steps; raise optimizer.lr", step)
        self.start = None


def require_finite(learning: Mapping[str, Tensor], step: int) -> None:
    """Refuse to save weights that are not finite; waits for the accelerator.

    Raises:
        RunError: names the first of them.
    """
    norms = _norms(learning)
    if not norms.isfinite().all():
        name = list(learning)[int((~norms.isfinite()).nonzero()[0])]
        raise RunError(f"the weights after step {step} are not finite ({name}); earlier files are kept; {WAY_OUT}")


def _norms(learning: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([norm.float() for norm in torch._foreach_norm([p.detach() for p in learning.values()])]).cpu()
