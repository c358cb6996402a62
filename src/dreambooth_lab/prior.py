"""Prior preservation: the training target of class rows, which prevents the class from drifting towards the subject."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from .batch import Batch, Cond
from .config import enums

Predict = Callable[[Tensor, Tensor, Cond], Tensor]  # (x_t, t, cond) → the network's prediction


class Prior(Protocol):
    def __call__(self, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor: ...


class Noise:
    """As in the paper: the target of class rows is the true noise, as for every row (Ruiz et al. 2023, eq. 2)."""

    def __call__(self, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        return target


class Teacher:
    """The target of class rows is the base model's prediction for the same (x_t, t, cond): self-distillation, without the
    error of the class images themselves. Only class rows are run.

    Args:
        predict: the denoiser.
        base: context manager in which `predict` is exactly the base model.
    """

    def __init__(self, predict: Predict, base: Callable[[], AbstractContextManager[None]]):
        self.predict, self.base = predict, base

    def __call__(self, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        rows = batch.class_rows
        if len(rows) == 0:
            return target
        return target.index_copy(0, rows, self.predict_base(batch, x_t, t, rows).to(target.dtype))

    def predict_base(self, batch: Batch, x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """The base model's prediction for these rows, without gradient."""
        with torch.no_grad(), self.base():
            return self.predict(x_t[rows], t[rows], batch.cond.select(rows))


class Banked:
    """The target of class rows is the base model's prediction for their (x_t, t, cond), cached and part of the batch."""

    def __call__(self, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        if batch.teacher_output is None or len(batch.class_rows) == 0:
            return target
        return target.index_copy(0, batch.class_rows, batch.teacher_output.to(target.dtype))


def build_prior(kind: enums.PriorKind, teacher: Teacher) -> Prior:
    if kind is enums.PriorKind.teacher:
        return teacher
    return Banked() if kind is enums.PriorKind.bank else Noise()
