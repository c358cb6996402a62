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
        with torch.no_grad(), self.base():
            taught = self.predict(x_t[rows], t[rows], batch.cond.take(rows))
        return target.index_copy(0, rows, taught.to(target.dtype))


def build_prior(kind: PriorKind, predict: Predict, base: Callable[[], AbstractContextManager[None]]) -> Prior:
    return Teacher(predict, base) if kind is PriorKind.teacher else Noise()
