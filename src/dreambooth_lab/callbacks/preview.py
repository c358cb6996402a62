"""What is sent to webhooks: validation images, during sampling and when they are done, and metrics."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from PIL import Image
from torch import Tensor

from ..config import PreviewConfig
from ..models.family import Family, OnStep
from .messages import Message
from .webhook import Sender

log = logging.getLogger(__name__)

PATIENCE = 15.0  # time limit of deliveries after the end of the run, seconds


class Previews:
    """Adds the metadata of images and passes them to the sender.

    Args:
        run: name of the run, part of every message.
    """

    def __init__(self, cfg: PreviewConfig, sender: Sender, family: Family, run: str):
        self.cfg, self.sender, self.family, self.name = cfg, sender, family, run

    def on_step(self, facts: dict[str, Any], seeds: Sequence[int], first: int = 0) -> OnStep | None:
        """The function that sampling calls; None when previews are off.

        Args:
            facts: prompt, training_step, total_steps.
            seeds: of the images, in order.
            first: index of the first one.
        """
        if not self.cfg.enabled:
            return None

        def show(step: int, latents: Tensor) -> None:
            if step % self.cfg.every_n_steps == 0:
                shown = _images(self.family.preview(latents))
                self._send(shown, facts | {"sampler_step": step}, seeds, first=first, final=False)

        return show

    def done(self, pictures: Sequence[Path], facts: dict[str, Any], seeds: Sequence[int]) -> None:
        """Send the files of finished images."""
        self._send(pictures, facts | {"sampler_step": facts["total_steps"]}, seeds, first=0, final=True)

    def _send(
        self, pictures: Sequence[Image.Image | Path], facts: dict[str, Any], seeds: Sequence[int], first: int, final: bool
    ) -> None:
        for i, (picture, seed) in enumerate(zip(pictures, seeds, strict=True), first):
            self.sender.send(Message(picture, {"run": self.name, **facts, "seed": seed, "image_index": i}, final))


class WebhookLogger(Logger):
    """Sends a run's metrics as they are logged.

    Args:
        run: name of the run, part of every message.
    """

    name, version = "webhook", 0

    def __init__(self, sender: Sender, run: str):
        super().__init__()
        self.sender, self.run = sender, run

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.sender.send_metrics(self.run, step or 0, metrics)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are not sent."""


class CloseWebhooks(Callback):
    """Waits briefly for queued messages at the end, and logs the counts. Must come after all callbacks that send."""

    def __init__(self, sender: Sender):
        self.sender = sender

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(PATIENCE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(0.0)

    def _close(self, patience: float) -> None:
        for receiver, counts in self.sender.close(patience).items():
            log.info("webhook %s: %s", receiver, ", ".join(f"{n} {what}" for what, n in counts.items()))


def _images(pixels: Tensor) -> list[Image.Image]:
    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in bytes_]
