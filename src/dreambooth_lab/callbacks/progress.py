"""The progress of training: a bar in the terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..data.module import DreamBoothData
from ..dreambooth import DreamBooth
from ..profiling.phases import Phases
from ..profiling.speed import peak, row_flops
from ..terminal import console, span
from .metrics import StepMetrics
from .periodic import Interval

log = logging.getLogger(__name__)

WIDE, NARROW = 110, 75  # terminal widths below which the bar shows less
FIRST = 3  # steps without time measurement: kernels are chosen and compiled
LOG_EVERY = 60.0  # seconds between two lines in a log file


class TimeLeft:
    """The remaining time of a run, from the finished steps and evaluations.

    Args:
        evaluations: phase → schedule of its evaluations; a future evaluation takes the average time of the past ones.
    """

    def __init__(self, evaluations: Mapping[str, Interval], last: int):
        every = range(1, last + 1)
        self.last, self.evaluations = (
            last,
            {phase: [step for step in every if when.due(step)] for phase, when in evaluations.items()},
        )
        self.start = self.since = 0
        self.began, self.took_before, self.measuring = 0.0, 0.0, False

    def begin(self, step: int, now: float) -> None:
        """Training starts after this many steps."""
        self.start, self.since, self.began, self.measuring = step, step, now, False

    def seconds(self, step: int, now: float, elapsed: Mapping[str, float]) -> float | None:
        """Seconds until the end; None while too few steps are measured.

        Args:
            elapsed: phase → seconds so far, not part of the steps' time.
        """
        aside = sum(elapsed.values())
        if not self.measuring:
            if step - self.start >= FIRST:
                self.since, self.began, self.took_before, self.measuring = step, now, aside, True
            return None
        if step <= self.since:
            return None
        a_step = (now - self.began - (aside - self.took_before)) / (step - self.since)
        return (self.last - step) * a_step + sum(
            self._evaluation_time(phase, step, elapsed.get(phase, 0.0)) for phase in self.evaluations
        )

    def _evaluation_time(self, phase: str, step: int, elapsed: float) -> float:
        """Seconds of the future evaluations, including this step's; 0 before the first one."""
        due = self.evaluations[phase]
        done = max(bisect_left(due, step) - bisect_right(due, self.start), 0) + (self.start == 0)
        return (len(due) - bisect_left(due, step)) * elapsed / done if done else 0.0


class Bar(Callback):
    """Progress bar: optimiser steps with loss, recent steps and samples per second, the share of the device's peak FLOP/s if
    known, memory and time left, fitted to the width of the terminal. If the output is not a terminal, one line per minute.

    Args:
        metrics: placed before this callback; its newest values are shown.
        rows: of an optimiser step.
        left: estimates the remaining time.
    """

    def __init__(self, metrics: StepMetrics, data: DreamBoothData, rows: int, left: TimeLeft):
        self.metrics, self.data, self.rows, self.left = metrics, data, rows, left
        self.step_share = 0.0  # of the device's peak FLOP/s, at one step per second; 0: unknown
        self.console = console()
        columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
        if self.console.width < NARROW:
            columns = columns[2:]
        self.bar = Progress(*columns, console=self.console)
        self.estimated = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DreamBooth)
        most = peak(pl_module.family.device, getattr(torch, pl_module.cfg.model.dtype.value))
        if most:
            self.step_share = self.rows * row_flops(pl_module, self.data.text(""), self.data.schedule.buckets) / most
        self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, status="")
        self.shown, self.since = trainer.global_step, time.monotonic()
        self.left.begin(self.shown, self.since)
        if self.console.is_terminal:
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, step = time.monotonic(), trainer.global_step
        left = self.left.seconds(step, now, _elapsed(trainer, self.left.evaluations))
        every = 1 if self.console.is_terminal else LOG_EVERY
        if left is not None and not self.estimated and now - self.left.began >= 1:
            self._estimate(step, left)
        elif now - self.since < every and step < trainer.max_steps:
            return
        rate = (step - self.shown) / max(now - self.since, 1e-9)
        status = self.status(rate, pl_module.device, left)
        if self.console.is_terminal:
            self.bar.update(self.task, completed=step, status=status)
        else:
            log.info("step %d of %d  %s", step, trainer.max_steps, status)
        self.shown, self.since = step, now

    def _estimate(self, step: int, left: float) -> None:
        """Print the estimated duration once, after the first steps."""
        self.estimated = True
        self.bar.console.print(
            f"about {span(left)} to go, estimated from steps {self.left.since + 1} to {step} and the images so far"
        )

    def status(self, rate: float, device: torch.device, left: float | None = None) -> str:
        """The newest loss and the speed, at `rate` steps per second; shortened in a narrow terminal."""
        loss = f"loss {self.metrics.last.get('train/loss', float('nan')):.4f}"
        share = f"{self.step_share * rate:.0%} of peak" if self.step_share else ""
        parts = [loss, f"{rate:.2f} steps/s", f"{_memory(device) / 2**30:.1f} GiB"]
        if self.console.width >= WIDE:
            parts[2:2] = [f"{rate * self.rows:.1f} samples/s", share]
        return "  ".join(part for part in [*parts, f"{span(left)} left" if left is not None else ""] if part)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()


def _elapsed(trainer: Trainer, phases: Collection[str]) -> dict[str, float]:
    """Phase → seconds so far."""
    profiler = getattr(trainer, "profiler", None)
    of = profiler.of if isinstance(profiler, Phases) else {}
    return {name: phase.seconds for name, phase in of.items() if name in phases}


def _memory(device: torch.device) -> int:
    """Bytes used on the training device: the allocator's on CUDA, the process's on the CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else psutil.Process().memory_info().rss
