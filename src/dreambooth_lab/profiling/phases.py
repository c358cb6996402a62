"""Time and memory of a run: wall seconds and peak memory of each phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from lightning.pytorch.profilers import Profiler
from rich.table import Table

OF_CALLBACK = {  # the other callbacks count as training
    "Validation": "images", "EvalLoss": "eval loss", "Leakage": "eval loss", "Best": "saving", "Export": "saving",
    "Checkpoints": "saving", "CloseWebhooks": "webhooks",
}  # fmt: skip
EVERY = 0.05  # seconds between two samples of the process's memory


@dataclass
class Phase:
    seconds: float = 0.0
    memory: int = 0  # bytes, the process's largest resident size
    device_memory: int = 0  # bytes, the most that was allocated on a CUDA device; 0 without one


class Phases(Profiler):
    """Lightning's profiler of a run, also for the phases before and after `fit`. The time of a nested phase is not counted in the
    outer one, so that the seconds add up to the total.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, Phase] = {}
        self.open: list[str] = []
        self.since = 0.0
        self.process = psutil.Process()

    def start(self, action_name: str) -> None:
        owner = action_name.removeprefix("[Callback]").partition(".")[0].partition("{")[0]
        name = OF_CALLBACK.get(owner, self.open[-1] if self.open else action_name)
        if self.open and name == self.open[-1]:
            self.open.append(name)  # the same phase continues
            return
        self._turn()
        self.of.setdefault(name, Phase())
        self.open.append(name)

    def stop(self, action_name: str) -> None:
        if len(self.open) > 1 and self.open[-1] == self.open[-2]:
            self.open.pop()
            return
        self._turn()
        self.open.pop()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A context for one phase; a thread samples the memory."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        with self.profile(name):
            watch.start()
            try:
                yield
            finally:
                over.set()
                watch.join()

    def _turn(self) -> None:
        """Add the elapsed time to the innermost phase."""
        now = time.perf_counter()
        if self.open:
            phase = self.of[self.open[-1]]
            phase.seconds += now - self.since
            phase.memory = max(phase.memory, self.process.memory_info().rss)
            if torch.cuda.is_available():
                phase.device_memory = max(phase.device_memory, torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()
        self.since = now

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(EVERY):
            phase = self.of[self.open[-1]]
            phase.memory = max(phase.memory, self.process.memory_info().rss)

    def cost(self) -> dict[str, dict[str, float]]:
        """Phase → its time and memory, for a file."""
        return {
            name: {
                "seconds": round(phase.seconds, 1),
                "memory_mib": round(phase.memory / 2**20),
                "device_memory_mib": round(phase.device_memory / 2**20),
            }
            for name, phase in self.of.items()
        }

    def table(self) -> Table:
        table = Table("phase", "seconds", "process, peak MiB", "device, peak MiB", title="Time and memory", title_justify="left")
        for name, phase in self.of.items():
            device = f"{phase.device_memory / 2**20:,.0f}" if phase.device_memory else "-"
            table.add_row(name, f"{phase.seconds:.1f}", f"{phase.memory / 2**20:,.0f}", device)
        return table
