"""Ctrl-C and a machine that is taken away: the run saves where it is, and says how it goes on."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..config import Interrupted
from ..runfolder import RunFolder
from .checkpoint import Checkpoints
from .export import Export

# SIGUSR1 and SIGUSR2: what `sbatch --signal=USR1@120` and its kin send before the time is up.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGBREAK")


class Interruption(Callback):
    """The first signal lets the optimiser step that is going on end, then saves and exports; a second one stops at once.

    Comes last of the callbacks. Signals that the process was started to ignore stay ignored.

    Args:
        export: None on all ranks but the first.
    """

    def __init__(self, folder: RunFolder, checkpoints: Checkpoints, export: Export | None):
        self.folder, self.checkpoints, self.export = folder, checkpoints, export
        self.asked = 0  # number of the signal
        self.handlers: dict[int, Any] = {}  # those before ours
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self.handlers[number] = before
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        print(f"\n{signal.Signals(number).name}: saving after this step; once more stops at once", flush=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.step:  # in mid-accumulation
            return
        self.step = step
        if not trainer.strategy.reduce_boolean_decision(bool(self.asked), all=False):
            return
        self.save(trainer, pl_module)
        raise Interrupted(f"stopped at step {step} and saved; go on with: python -m dreambooth_lab resume={self.folder.root}",
                          self.asked or signal.SIGTERM)  # fmt: skip

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checkpoint and the export of this step, unless they are there."""
        if self.checkpoints.step != trainer.global_step:
            self.checkpoints.save(trainer, pl_module)
            if self.export:
                self.export.write(pl_module, trainer.global_step, self.folder.export)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
