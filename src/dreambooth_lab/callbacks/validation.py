"""Validation images during training, by the family's own diffusers pipeline with fixed seeds, first of the base model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from PIL import Image

from ..batch import Caption, Text
from ..data.module import DreamBoothData, class_prompts
from ..dreambooth import DreamBooth
from ..models.family import OnStep
from ..models.steering import Steering, steered
from ..runfolder import RunFolder
from . import image_grids
from .ema import EMA, LIVE, PREFIX, EvalWeights
from .image_grids import Rows
from .metrics import record
from .periodic import Interval, Periodic
from .preview import Previews
from .scores import Score, Scores, summary

Drawn = dict[int, list[Image.Image]]  # index of the prompt → its images


class Validation(Periodic):
    """Generates images for every prompt with the live weights, their average, or both.

    Image i of a prompt starts from the same noise at every step, so differences come from training.
    """

    def __init__(
        self, interval: Interval, cfg: DictConfig, data: DreamBoothData, folder: RunFolder, weights: EvalWeights,
        previews: Previews | None, scores: Scores | None,
    ):  # fmt: skip
        super().__init__(interval)
        self.cfg, self.data, self.folder, self.weights, self.previews, self.scores = cfg, data, folder, weights, previews, scores
        self.class_prompts = class_prompts(data.cfg)

    def evaluate(self, step: int, trainer: Trainer, module: DreamBooth) -> None:
        scores: list[Score] = []
        for kind, holds_for in self.weights.at_step(step):
            second = step > 0 and kind != self.weights.kinds[0]
            folder = self.folder.averaged if second else self.folder.image_folder
            with self.weights(module, kind):
                rows = self._draw_all(step, kind, folder, trainer, module)
            if not trainer.is_global_zero:
                continue
            sheet = image_grids.save_grid(folder, step, rows)
            image_grids.show(trainer.loggers, f"images/{kind}", sheet, step)
            seen = self.scores(self.cfg.prompts, rows) if self.scores else []
            for name in holds_for if seen else ():
                scores += [score._replace(step=step, weights=name) for score in seen]
                record(trainer, {PREFIX[name] + metric: value for metric, value in summary(seen).items()}, step)
        if not trainer.is_global_zero:
            return
        if self.scores:
            self.scores.table.add(step, scores)
        if self.weights.kinds == (LIVE, EMA) and step > 0:
            self._compare(step, trainer)

    def _draw_all(self, step: int, kind: str, folder: Path, trainer: Trainer, module: DreamBooth) -> Rows:
        """Every prompt's images, divided over the ranks; the first rank gets and saves all, the others have only their own."""
        own: dict[int, list[Image.Image]] = {}
        failed: Exception | None = None
        try:
            for number in range(trainer.global_rank, len(self.cfg.prompts), trainer.world_size):
                own[number] = self._draw(module, number, step, kind)
                if trainer.is_global_zero:
                    self._keep(number, own[number], step, kind, folder)
        except (OSError, RuntimeError) as error:  # raised after the gather, or the other ranks would wait for this one
            failed = error
        whole, broken = gathered(own, str(failed) if failed else "", trainer)
        if failed or broken:
            raise failed or RuntimeError(broken)
        for number in whole.keys() - own.keys():
            self._keep(number, whole[number], step, kind, folder)
        return list(whole.values())

    def _compare(self, step: int, trainer: Trainer) -> None:
        """A grid of the images of the base model, the live weights and the average."""
        name = f"step_{step:07d}.png"
        paths = (self.folder.base, self.folder.image_folder / name, self.folder.averaged / name)
        sheet = image_grids.beside([Image.open(path) for path in paths], len(self.cfg.prompts))
        self.folder.compared.mkdir(exist_ok=True)
        sheet.save(self.folder.compared / name)
        image_grids.show(trainer.loggers, "images/base_live_ema", sheet, step)

    def _photos(self, module: DreamBooth, n: int) -> list[Image.Image]:
        """The initial images of image-to-image families: the subject's photos in turn."""
        own = [photo.image for photo in self.data.photos()] if module.family.needs_image else []
        return [own[i % len(own)] for i in range(n)] if own else []

    def _text(self, module: DreamBooth, prompt: Caption) -> Text:
        return module.text.encode([prompt]) if module.text and module.text.changes(prompt) else self.data.text(prompt)

    def _facts(self, number: int, step: int, kind: str) -> dict[str, Any]:
        prompt, whole = self.cfg.prompts[number], self.cfg.num_inference_steps
        return {"prompt": prompt, "training_step": step, "total_steps": whole, "weights": kind}

    @property
    def _seeds(self) -> range:
        return range(self.cfg.seed, self.cfg.seed + self.cfg.num_images)

    def _keep(self, number: int, images: list[Image.Image], step: int, kind: str, folder: Path) -> None:
        """Save and send a prompt's images."""
        paths = image_grids.save_row(folder, step, number, images)
        if self.previews:
            self.previews.done(paths, self._facts(number, step, kind), self._seeds)

    def _draw(self, module: DreamBooth, number: int, step: int, kind: str) -> list[Image.Image]:
        """One prompt's images."""
        n, prompt, seeds = self.cfg.num_images, self.cfg.prompts[number], self._seeds
        facts = self._facts(number, step, kind)
        text, against = self._text(module, prompt), self._text(module, self.cfg.negative_prompt or None)
        photos, size = self._photos(module, n), self.cfg.batch_size
        drawn: list[Image.Image] = []
        about_class = self.class_prompts.get(prompt)
        instead = self._text(module, about_class) if about_class else None
        for first in range(0, n, size):
            some = seeds[first : first + size]
            draw = partial(self._generate, module, against, some, photos[first : first + size])
            with steered(
                module.family.denoiser, Steering.of(self.cfg), self.cfg.num_inference_steps,
                partial(draw, instead, None) if instead else None, partial(module.adapter.weakened, module.family.denoiser),
            ):  # fmt: skip
                drawn += draw(text, self.previews.on_step(facts, some, first) if self.previews else None)
        return drawn

    def _generate(
        self, module: DreamBooth, against: Text, seeds: range, photos: list[Image.Image], text: Text, on_step: OnStep | None
    ) -> list[Image.Image]:  # fmt: skip
        return module.family.generate(
            text.repeat(len(seeds)), against.repeat(len(seeds)), height=self.cfg.resolution, width=self.cfg.resolution,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=self.cfg.num_inference_steps, guidance_scale=self.cfg.guidance_scale,
            photos=photos, on_step=on_step,
        )  # fmt: skip


def gathered(own: Drawn, failed: str, trainer: Trainer) -> tuple[Drawn, str]:
    """On the first rank the images of all ranks, elsewhere those of this rank; and the errors of all."""
    if trainer.world_size == 1:
        return own, failed
    parts: list[tuple[Drawn, str]] = [(own, failed)] * trainer.world_size
    trainer.strategy.barrier("validation images")
    dist.gather_object((own, failed), parts if trainer.is_global_zero else None)
    if not trainer.is_global_zero:
        return {}, failed
    whole = {number: images for drawn, _ in parts for number, images in drawn.items()}
    return dict(sorted(whole.items())), "; ".join(text for _, text in parts if text)
