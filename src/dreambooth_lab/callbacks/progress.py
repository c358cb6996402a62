"""The bar in the terminal."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data.module import DreamBoothData
from ..dreambooth import DreamBooth
from ..speed import peak, row_flops
from .metrics import StepMetrics


class Bar(Callback):
    """Optimiser steps with loss, steps and samples a second over the last seconds, the share of the device's peak where that is
    known, memory and time left.

    Args:
        metrics: placed before this callback; its newest values are shown.
        rows: of an optimiser step.
    """

    def __init__(self, metrics: StepMetrics, data: DreamBoothData, rows: int):
        self.metrics, self.data, self.rows = metrics, data, rows
        self.step_share = 0.0  # of the device's peak, at one step a second; 0: not known
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DreamBooth)
        most = peak(pl_module.family.device, getattr(torch, pl_module.cfg.model.dtype.value))
        if most:
            self.step_share = self.rows * row_flops(pl_module, self.data.text(""), self.data.schedule.buckets) / most
        self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, told="")
        self.shown, self.since = trainer.global_step, time.monotonic()
        self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, step = time.monotonic(), trainer.global_step
        if now - self.since < 1 and step < trainer.max_steps:
            return
        rate = (step - self.shown) / max(now - self.since, 1e-9)
        self.bar.update(self.task, completed=step, told=self.told(rate, pl_module.device))
        self.shown, self.since = step, now

    def told(self, rate: float, device: torch.device) -> str:
        """The newest loss and the pace, at `rate` steps a second."""
        loss = self.metrics.last.get("train/loss", float("nan"))
        share = f"  {self.step_share * rate:.0%} of peak" if self.step_share else ""
        pace = f"{rate:.2f} steps/s  {rate * self.rows:.1f} samples/s{share}"
        return f"loss {loss:.4f}  {pace}  {_memory(device) / 2**30:.1f} GiB"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()


def _memory(device: torch.device) -> int:
    """Bytes held on the training device: the allocator's on CUDA, the process's own on the CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss
