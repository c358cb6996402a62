"""Trigger leakage: how much the adapter acts without its word.

    eval/leakage    Σ ‖v(class prompt) - v_base(class prompt)‖² / Σ ‖v(caption) - v_base(caption)‖²

v is the network's prediction at the eval loss's own images, timesteps and noise; the class prompt is the image's caption without
the rare word. 0: the adapter acts on its word only; 1: it acts regardless of it; above 1 it acts more without it. While the
adapter's effect is not above rounding, as at step 0, there is no value. Every row is written to leakage.csv.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor

from ..batch import Batch
from ..config import LEAKAGE
from ..data.eval_batches import EvalBatch
from ..dreambooth import DreamBooth
from ..runfolder import RunFolder
from .csv_log import CsvLog
from .ema import PREFIX, EvalWeights
from .eval_loss import noised, over_ranks
from .metrics import record
from .periodic import Interval, Periodic

ROUNDING = 1e-5  # squared effect of rounding, in bfloat16, as a share of the squared prediction


class LeakageRow(NamedTuple):
    """The adapter's squared effect on one prediction, means over its elements."""

    step: int
    weights: str  # live or ema
    dataset: str
    image: str
    t: float
    with_word: float
    without_word: float
    base: float  # the base model's squared prediction
    stratum: float  # t before the model's time shift


class Pair(NamedTuple):
    """The same rows with two captions."""

    with_word: EvalBatch
    without_word: EvalBatch


class Leakage(Periodic):
    """Compares predictions with the base model's, which are made once and kept on the host: two forward passes of the eval rows
    per evaluation, and two more at the first."""

    def __init__(self, interval: Interval, pairs: Sequence[Pair], folder: RunFolder, weights: EvalWeights):
        super().__init__(interval)
        self.pairs, self.weights = pairs, weights
        self.table = CsvLog(folder.leakage, LeakageRow)
        self.base: dict[int, list[Tensor]] = {}  # number of the pair → the base model's predictions

    def evaluate(self, step: int, trainer: Trainer, module: DreamBooth) -> None:
        rows: list[LeakageRow] = []
        for kind, holds_for in self.weights.at_step(step):
            with self.weights(module, kind):
                seen = over_ranks(trainer, len(self.pairs), lambda i: self._compare(i, step, module))
            rows += [row._replace(weights=name) for name in holds_for for row in seen]
            value = leakage(seen)
            if value is not None:
                record(trainer, {PREFIX[name] + LEAKAGE: value for name in holds_for}, step)
        if trainer.is_global_zero:
            self.table.add(step, rows)

    @torch.no_grad()
    def _compare(self, number: int, step: int, module: DreamBooth) -> list[LeakageRow]:
        pair = self.pairs[number]
        batches = [move_data_to_device(one.batch, module.family.device) for one in pair]
        if number not in self.base:
            with module.adapter.base():
                self.base[number] = [_predict(module, batch, trained_text=False).cpu() for batch in batches]
        base = [answer.to(module.family.device) for answer in self.base[number]]
        moved = [(_predict(module, batch) - own).square().mean((1, 2, 3)) for batch, own in zip(batches, base, strict=True)]
        times, strata = noised(batches[0], module)[2:]
        values = (times, *moved, base[0].square().mean((1, 2, 3)), strata)
        found = zip(pair.with_word.rows, *(value.tolist() for value in values), strict=True)
        return [LeakageRow(step, "", dataset, image, *numbers) for (dataset, image), *numbers in found]


def _predict(module: DreamBooth, batch: Batch, trained_text: bool = True) -> Tensor:
    """The prediction in float32; the cached conditioning is by the base model's text encoders."""
    x_t, t, *_ = noised(batch, module)
    return module.predict(x_t, t, module.conditioning(batch) if trained_text else batch.cond).float()


def leakage(rows: Sequence[LeakageRow]) -> float | None:
    """The ratio of the sums; None while the adapter has no effect above rounding."""
    acts = fmean(row.with_word for row in rows)
    if acts <= ROUNDING * fmean(row.base for row in rows):
        return None
    return fmean(row.without_word for row in rows) / acts
