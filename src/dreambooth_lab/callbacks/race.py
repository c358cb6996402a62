"""A run of a sweep that has lost to another arm saves its step and ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, Trainer

from ..config import Lost
from ..dreambooth import DreamBooth
from .interruption import Interruption
from .periodic import Interval


class Race(Callback):
    """Comes after the eval loss and after `Interruption`, which saves.

    Args:
        due: of the eval loss.
        lost: step → why the run need not go on, or None.
    """

    def __init__(self, due: Interval, lost: Callable[[int], str | None], interruption: Interruption):
        self.due, self.lost, self.interruption = due, lost, interruption
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.step or step >= trainer.max_steps or not self.due.due(step):
            return
        self.step = step
        if why := self.lost(step):
            assert isinstance(pl_module, DreamBooth)
            self.interruption.save(trainer, pl_module)
            root = self.interruption.folder.root
            raise Lost(f"{why}; stopped at step {step} and saved; to go on with it all the same: "
                       f"python -m dreambooth_lab hydra.mode=RUN resume={root} race=0")  # fmt: skip
