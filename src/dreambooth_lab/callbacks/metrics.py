"""Metrics of every optimiser step: computed once, written to metrics.csv and the other loggers, shown in the bar."""

from __future__ import annotations

import csv
from argparse import Namespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.optim import Optimizer

from ..runfolder import METRICS_HEADER, RunFolder
from .async_read import Event, read, record_event

NAMES = {"total": "train/loss", "instance": "train/loss_instance", "prior": "train/loss_prior", "weights": "train/loss_weights"}


def record(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Log to every logger of the run."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step)


class StepMetrics(Callback):
    """Means over the micro-batches and ranks of an optimiser step, logged with the number of finished steps: of the minimised
    loss, of the errors of the step's instance rows and class rows, if it has any, and of ‖ΔW‖² with prior=weights.

    Args:
        every_n_steps: write every n-th step; the values of the others are not read from the device.
    """

    def __init__(self, every_n_steps: int):
        self.every_n_steps = every_n_steps
        self.parts: dict[str, list[tuple[Tensor, int]]] = {}  # values, and their numbers of rows
        self.last: dict[str, float] = {}
        self.step = 0
        self.rate = 0.0  # learning rate of the newest step
        self.known: Event = None  # when the newest micro-batch's values are ready

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.known = record_event(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.rate = float(optimizer.param_groups[0]["lr"])  # at the end of the batch it is already the next step's

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        rows = {"total": 1, "instance": len(batch.instance_rows), "prior": len(batch.class_rows), "weights": 1}
        for name in NAMES.keys() & outputs.keys():
            self.parts.setdefault(name, []).append((outputs[name], rows[name]))
        if trainer.global_step == self.step:
            return  # gradients are still being accumulated
        self.step = trainer.global_step
        if self.step % self.every_n_steps == 0 or self.step == trainer.max_steps:
            self.last = self._means(trainer)
            self.last["train/lr"] = self.rate
            record(trainer, self.last, self.step)
        self.parts = {}

    def _means(self, trainer: Trainer) -> dict[str, float]:
        """Means over all rows of the step, on all ranks; a term without rows has no value."""
        sums = torch.zeros(len(NAMES), 2, dtype=torch.float64)  # sum, rows
        for own, name in zip(sums, NAMES, strict=True):
            if parts := self.parts.get(name):
                values = read([value for value, _ in parts], self.known).double()
                rows = torch.tensor([n for _, n in parts], dtype=torch.float64)
                own += torch.stack([(values * rows).sum(), rows.sum()])
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").cpu()
        found = zip(NAMES.values(), sums.tolist(), strict=True)
        return {name: total / rows for name, (total, rows) in found if rows}


class MetricsFile(Logger):
    """metrics.csv, one line per value (step, name, value), exact floats; appended and flushed, so a killed run loses nothing.

    Args:
        folder: the run's.
        keep_to: last step whose lines are kept, for a run resumed from an older checkpoint.
    """

    def __init__(self, folder: RunFolder, keep_to: int):
        super().__init__()
        old = [line for line in folder.read_metrics() if line[0] <= keep_to]
        self.file = folder.metrics.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file)
        self.writer.writerow(METRICS_HEADER)
        self.writer.writerows((step, name, repr(value)) for step, name, value in old)
        self.file.flush()
        self.newest = {name: (step, value) for step, name, value in old}  # of every metric

    name = "metrics"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.newest |= {name: (step or 0, float(value)) for name, value in metrics.items()}
        self.writer.writerows((step, name, repr(float(value))) for name, value in metrics.items())
        self.file.flush()

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    def finalize(self, status: str) -> None:
        self.file.close()
