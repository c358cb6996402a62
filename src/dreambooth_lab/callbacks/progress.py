"""The bar in the terminal."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .metrics import StepMetrics


class Bar(Callback):
    """Optimiser steps with loss, steps/s over the last seconds, memory and time left.

    Args:
        metrics: placed before this callback; its newest values are shown.
    """

    def __init__(self, metrics: StepMetrics):
        self.metrics = metrics
        text = TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.2f} steps/s  {task.fields[memory]:.1f} GiB")
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), text, TimeElapsedColumn(), TimeRemainingColumn()
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fields: dict[str, Any] = {"loss": float("nan"), "rate": 0.0, "memory": 0.0}
        self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, **fields)
        self.shown, self.since = trainer.global_step, time.monotonic()
        self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, step = time.monotonic(), trainer.global_step
        if now - self.since < 1 and step < trainer.max_steps:
            return
        rate = (step - self.shown) / max(now - self.since, 1e-9)
        loss = self.metrics.last.get("train/loss", float("nan"))
        self.bar.update(self.task, completed=step, loss=loss, rate=rate, memory=_memory(pl_module.device) / 2**30)
        self.shown, self.since = step, now

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()


def _memory(device: torch.device) -> int:
    """Bytes held on the training device: the allocator's on CUDA, the process's own on the CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss
