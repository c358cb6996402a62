"""The eval loss: the denoising error on images that are never trained on. Overfitting starts at its minimum.

    eval/loss           mean over all rows
    eval/loss_DATASET   … over those of one dataset
    eval/loss_tT        … over those at one timestep T, named before the model's time shift

The plain squared error of the network's prediction, without training weights, masks, dropout or rollout, at fixed timesteps with
fixed noise: two evaluations of the same weights give the same bits. Metrics of the averaged weights start with ema/. Every row
is written to eval.csv, so that changes can be compared row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor

from ..batch import Batch, to_device
from ..data.eval_batches import EvalBatch
from ..diffusion.time import shift
from ..dreambooth import DreamBooth
from ..runfolder import RunFolder
from .csv_log import CsvLog
from .ema import PREFIX, EvalWeights
from .metrics import record
from .periodic import Interval, Periodic

Row = TypeVar("Row")


class EvalRow(NamedTuple):
    """One row's error."""

    step: int
    weights: str  # live or ema
    dataset: str
    image: str
    t: float
    loss: float
    stratum: float  # t before the model's time shift, which depends on the image size


class EvalLoss(Periodic):
    """Evaluates the eval batches at step 0 (the base model, as reference) and at every interval."""

    def __init__(self, interval: Interval, eval_batches: Sequence[EvalBatch], folder: RunFolder, weights: EvalWeights):
        super().__init__(interval)
        self.eval_batches, self.weights = eval_batches, weights
        self.table = CsvLog(folder.eval, EvalRow)

    def evaluate(self, step: int, trainer: Trainer, module: DreamBooth) -> None:
        rows: list[EvalRow] = []
        for kind, holds_for in self.weights.at_step(step):
            with self.weights(module, kind):
                seen = over_ranks(trainer, len(self.eval_batches), lambda i: evaluate(self.eval_batches[i], step, module))
            rows += [row._replace(weights=name) for name in holds_for for row in seen]
            for name in holds_for:
                record(trainer, {PREFIX[name] + metric: value for metric, value in summary(seen).items()}, step)
        if trainer.is_global_zero:
            self.table.add(step, rows)


def over_ranks(trainer: Trainer, batches: int, evaluate_one: Callable[[int], list[Row]]) -> list[Row]:
    """Every eval batch once, divided over the ranks; all ranks get all rows, in the order of the eval batches.

    Args:
        evaluate_one: number of a batch → its rows.
    """
    own = {i: evaluate_one(i) for i in range(trainer.global_rank, batches, trainer.world_size)}
    parts: list[dict[int, list[Row]]] = [own] * trainer.world_size
    if trainer.world_size > 1:
        trainer.strategy.barrier("eval rows")
        dist.all_gather_object(parts, own)
    whole = {i: rows for part in parts for i, rows in part.items()}
    return [row for i in sorted(whole) for row in whole[i]]


@torch.no_grad()
def evaluate(eval_batch: EvalBatch, step: int, module: DreamBooth) -> list[EvalRow]:
    """The error of each row with the module's current weights."""
    batch = move_data_to_device(eval_batch.batch, module.family.device)
    x_t, t, when, stratum = noised(batch, module)
    output = module.predict(x_t, t, module.conditioning(batch))
    error = (output.float() - module.path.target(batch.latents(), batch.eps, t)).square().mean((1, 2, 3))
    rows = zip(eval_batch.rows, when.tolist(), error.tolist(), stratum.tolist(), strict=True)
    return [EvalRow(step, "", dataset, picture, time, loss, even) for (dataset, picture), time, loss, even in rows]


def noised(batch: Batch, module: DreamBooth) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t [B C h w] and t [B] of an eval batch; on the host t, and t before the model's time shift."""
    low, high = module.family.times
    x0, stratum = batch.latents(), low + (high - low) * batch.u
    when = shift(stratum, module.family.shift(*x0.shape[2:]))
    t = to_device(when, x0.device)
    return module.path.noise(x0, batch.eps, t), t, when, stratum


def summary(rows: Sequence[EvalRow]) -> dict[str, float]:
    """Means with the logged names."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name in ("eval/loss", f"eval/loss_{row.dataset}", f"eval/loss_t{row.stratum:.3f}"):
            values.setdefault(name, []).append(row.loss)
    return {name: fmean(found) for name, found in values.items()}
