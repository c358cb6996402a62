"""Pictures while it trains: the family's own diffusers pipeline, fixed seeds, the base model first."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from PIL import Image

from ..batch import Text
from ..data.module import DreamBoothData
from ..dreambooth import DreamBooth
from ..runfolder import RunFolder
from . import pictures
from .ema import EMA, LIVE, PREFIX, Looks
from .metrics import record
from .periodic import Periodic, Timetable
from .preview import Previews
from .scores import Score, Scores, summary


class Validation(Periodic):
    """Draws every prompt with the live weights, their average, or both.

    Picture i of a prompt starts from the same noise at every step, so differences are the training's.
    """

    def __init__(
        self, timetable: Timetable, cfg: DictConfig, data: DreamBoothData, folder: RunFolder, looks: Looks,
        previews: Previews | None, scores: Scores | None,
    ):  # fmt: skip
        super().__init__(timetable)
        self.cfg, self.data, self.folder, self.looks, self.previews, self.scores = cfg, data, folder, looks, previews, scores

    def look(self, step: int, trainer: Trainer, module: DreamBooth) -> None:
        scores: list[Score] = []
        for kind, holds_for in self.looks.at(step):
            second = step > 0 and kind != self.looks.kinds[0]
            folder = self.folder.averaged if second else self.folder.pictures
            with self.looks(module, kind):
                rows = [self._draw(module, i, step, kind, folder) for i in range(len(self.cfg.prompts))]
            sheet = pictures.save_grid(folder, step, rows)
            pictures.show(trainer.loggers, f"pictures/{kind}", sheet, step)
            seen = self.scores(self.cfg.prompts, rows) if self.scores else []
            for name in holds_for if seen else ():
                scores += [score._replace(step=step, weights=name) for score in seen]
                record(trainer, {PREFIX[name] + metric: value for metric, value in summary(seen).items()}, step)
        if self.scores:
            self.scores.ledger.add(step, scores)
        if self.looks.kinds == (LIVE, EMA) and step > 0:
            self._compare(step, trainer)

    def _compare(self, step: int, trainer: Trainer) -> None:
        """The base model's pictures, the live weights', the average's."""
        name = f"step_{step:07d}.png"
        paths = (self.folder.base, self.folder.pictures / name, self.folder.averaged / name)
        sheet = pictures.beside([Image.open(path) for path in paths], len(self.cfg.prompts))
        self.folder.compared.mkdir(exist_ok=True)
        sheet.save(self.folder.compared / name)
        pictures.show(trainer.loggers, "pictures/base_live_ema", sheet, step)

    def _photos(self, module: DreamBooth, n: int) -> list[Image.Image]:
        """What pictures begin from, in families that refine: the subject's photos in turn."""
        own = [photo.image for photo in self.data.photos()] if module.family.refines else []
        return [own[i % len(own)] for i in range(n)] if own else []

    def _text(self, module: DreamBooth, prompt: str) -> Text:
        return module.text.encode([prompt]) if module.text and module.text.changes(prompt) else self.data.text(prompt)

    def _draw(self, module: DreamBooth, number: int, step: int, kind: str, folder: Path) -> list[Image.Image]:
        """One prompt's pictures, saved and sent."""
        n, prompt = self.cfg.num_images, self.cfg.prompts[number]
        seeds = range(self.cfg.seed, self.cfg.seed + n)
        facts = {"prompt": prompt, "training_step": step, "total_steps": self.cfg.num_inference_steps, "weights": kind}
        drawn = module.family.generate(
            self._text(module, prompt).repeat(n), self._text(module, self.cfg.negative_prompt).repeat(n),
            height=self.cfg.resolution, width=self.cfg.resolution,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], num_inference_steps=self.cfg.num_inference_steps,
            guidance_scale=self.cfg.guidance_scale, photos=self._photos(module, n),
            on_step=self.previews.on_step(facts, seeds) if self.previews else None,
        )  # fmt: skip
        paths = pictures.save_row(folder, step, number, drawn)
        if self.previews:
            self.previews.done(paths, facts, seeds)
        return drawn
