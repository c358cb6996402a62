"""Base class of periodic evaluations: their schedule, and the isolation from training."""

from __future__ import annotations

import logging
from abc import abstractmethod
from math import floor
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ..dreambooth import DreamBooth

log = logging.getLogger(__name__)


class Interval(NamedTuple):
    """Every n optimiser steps, every x epochs (0.5: twice per epoch), and at the last step; 0 disables either."""

    every_n_steps: int
    every_n_epochs: float
    steps_per_epoch: float
    last: int

    def due(self, step: int) -> bool:
        by_steps = self.every_n_steps > 0 and step % self.every_n_steps == 0
        return by_steps or step == self.last or self._periods_passed(step) > self._periods_passed(step - 1)

    def _periods_passed(self, step: int) -> int:
        """How many times this fraction of an epoch has passed."""
        return floor(step / (self.every_n_epochs * self.steps_per_epoch) + 1e-9) if self.every_n_epochs else 0


class Periodic(Callback):
    """Evaluates the base model (step 0), at every interval, and at the end, also after early stopping.

    Inside `evaluate` there is no dropout and no gradient; afterwards mode, optimiser and torch's generators are restored.
    """

    def __init__(self, interval: Interval):
        self.interval = interval
        self.step = self.evaluated = -1

    @abstractmethod
    def evaluate(self, step: int, trainer: Trainer, module: DreamBooth) -> None:
        """Evaluate the weights after `step` optimiser steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(0, trainer, pl_module)
        self.step = self.evaluated = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self.step and self.interval.due(step):
            self._evaluate(step, trainer, pl_module)
        self.step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.evaluated != trainer.global_step:
            self._evaluate(trainer.global_step, trainer, pl_module)

    def _evaluate(self, step: int, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, DreamBooth)
        was_training = module.training
        module.eval()
        with torch.random.fork_rng(), torch.no_grad():
            self._try(step, trainer, module)
        module.train(was_training)
        self.evaluated = step

    def _try(self, step: int, trainer: Trainer, module: DreamBooth) -> None:
        """A failed evaluation doesn't stop the training, except at step 0, where no training is lost."""
        try:
            self.evaluate(step, trainer, module)
        except (OSError, RuntimeError) as error:
            if step == 0:
                raise
            log.exception("%s failed at step %d (%s); training continues", type(self).__name__, step, error)
