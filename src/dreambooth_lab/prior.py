"""What class rows should be answered with, so that the class does not drift onto the subject."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from .batch import Batch, Cond
from .config import PriorKind

Predict = Callable[[Tensor, Tensor, Cond], Tensor]  # (x_t, t, cond) → the network's answer


class Prior(Protocol):
    def __call__(self, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor: ...


class Noise:
    """The paper's own: class rows regress to the true noise, like every row (Ruiz et al. 2023, eq. 2)."""

    def __call__(self, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        return target


class Teacher:
    """Class rows regress to the base model's own answer on the same (x_t, t, cond): self-distillation, without the error
    of the class pictures themselves. Only class rows are run.

    Args:
        predict: the denoiser.
        base: enters a state in which `predict` is exactly the base model, and restores the adapter after.
    """

    def __init__(self, predict: Predict, base: Callable[[], AbstractContextManager[None]]):
        self.predict, self.base = predict, base

    def __call__(self, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        rows = batch.class_rows
        if len(rows) == 0:
            return target
        return target.index_copy(0, rows, self.answer(batch, x_t, t, rows).to(target.dtype))

    def answer(self, batch: Batch, x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The base model's answer for some rows, without gradient."""
        with torch.no_grad(), self.base():
            return self.predict(x_t[rows], t[rows], batch.cond.take(rows))


class Banked:
    """Class rows regress to the base model's answer at their own (x_t, t, cond), which came with the batch."""

    def __call__(self, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        if batch.taught is None or len(batch.class_rows) == 0:
            return target
        return target.index_copy(0, batch.class_rows, batch.taught.to(target.dtype))


def build_prior(kind: PriorKind, teacher: Teacher) -> Prior:
    if kind is PriorKind.teacher:
        return teacher
    return Banked() if kind is PriorKind.bank else Noise()
