"""Ctrl-C and termination signals: the run saves its state and prints how to resume."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..config import Interrupted
from ..runfolder import RunFolder
from .checkpoint import Checkpoints
from .export import Export

# SIGUSR1 and SIGUSR2: sent by `sbatch --signal=USR1@120` and similar options before the time limit.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGBREAK")


class Interruption(Callback):
    """After the first signal, finishes the current optimiser step, saves and exports; a second one stops at once.

    Must be the last callback. Signals that were ignored at the start of the process remain ignored.

    Args:
        export: None on all ranks but the first.
    """

    def __init__(self, folder: RunFolder, checkpoints: Checkpoints, export: Export | None):
        self.folder, self.checkpoints, self.export = folder, checkpoints, export
        self.signal = 0  # number of the signal
        self.handlers: dict[int, Any] = {}  # the previous handlers
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self.handlers[number] = before
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print(f"\n{signal.Signals(number).name}: saving after this step; a second signal stops at once", flush=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.step:  # in the middle of gradient accumulation
            return
        self.step = step
        if not trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False):
            return
        self.save(trainer, pl_module)
        raise Interrupted(f"stopped at step {step} and saved; resume with: python -m dreambooth_lab resume={self.folder.root}",
                          self.signal or signal.SIGTERM)  # fmt: skip

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint and the export of this step, unless they are there."""
        if self.checkpoints.step != trainer.global_step:
            self.checkpoints.save(trainer, pl_module)
            if self.export:
                self.export.write(pl_module, trainer.global_step, self.folder.export)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before Lightning restores the original handlers. Restored after that, Lightning's own would keep the trainer in memory
        and receive the signals of a sweep's next job."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
