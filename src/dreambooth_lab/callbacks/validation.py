"""Pictures while it trains: the family's own diffusers pipeline, fixed seeds, the base model first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from PIL import Image

from ..batch import Text
from ..data.module import DreamBoothData
from ..dreambooth import DreamBooth
from ..runfolder import RunFolder
from .preview import Previews
from .scores import Scores


class Validation(Callback):
    """Draws every prompt at step 0, every n steps, and at the last step.

    Picture i of a prompt starts from the same noise at every step, so differences are the training's. Training is not
    touched: generators are its own, and the global one and the module's mode are put back.
    """

    def __init__(
        self, cfg: DictConfig, data: DreamBoothData, folder: RunFolder, previews: Previews | None, scores: Scores | None
    ):
        self.cfg, self.data, self.folder, self.previews, self.scores = cfg, data, folder, previews, scores
        self.step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._paint(0, trainer, pl_module)
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self.step and (step % self.cfg.every_n_steps == 0 or step == trainer.max_steps):
            self._paint(step, trainer, pl_module)
        self.step = step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.previews:
            self.previews.close()

    def _paint(self, step: int, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, DreamBooth)
        was_training = module.training
        module.eval()
        with torch.random.fork_rng():
            rows = [self._pictures(module, prompt, step) for prompt in self.cfg.prompts]
        module.train(was_training)
        save(self.folder.pictures, step, rows)
        if self.scores:
            values = self.scores(step, self.cfg.prompts, rows)
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

    def _text(self, module: DreamBooth, prompt: str) -> Text:
        return module.text.encode([prompt]) if module.text and module.text.changes(prompt) else self.data.text(prompt)

    def _pictures(self, module: DreamBooth, prompt: str, step: int) -> list[Image.Image]:
        n = self.cfg.num_images
        seeds = range(self.cfg.seed, self.cfg.seed + n)
        facts = {"prompt": prompt, "training_step": step, "total_steps": self.cfg.num_inference_steps}
        pictures = module.family.generate(
            _rows(self._text(module, prompt), n), _rows(self._text(module, self.cfg.negative_prompt), n),
            height=self.cfg.resolution, width=self.cfg.resolution,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], num_inference_steps=self.cfg.num_inference_steps,
            guidance_scale=self.cfg.guidance_scale,
            on_step=self.previews.on_step(facts, seeds) if self.previews else None,
        )  # fmt: skip
        if self.previews:
            self.previews.done(pictures, facts, seeds)
        return pictures


def _rows(text: Text, n: int) -> Text:
    return Text(text.states.expand(n, -1, -1), text.pooled.expand(n, -1))


def save(folder: Path, step: int, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Each picture as step_N/PROMPT_IMAGE.png, and all of a step as one grid step_N.png: a row a prompt."""
    own = folder / f"step_{step:07d}"
    own.mkdir(parents=True, exist_ok=True)
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            picture.save(own / f"{i:02d}_{j:02d}.png")
            grid.paste(picture, (j * width, i * height))
    grid.save(own.with_suffix(".png"))
