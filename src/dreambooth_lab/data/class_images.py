"""Class pictures: from a folder, drawn by the base model before training, or the subject's photos under the class prompt."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from .. import draw
from ..config import enums
from ..draw import Purpose
from ..models.family import Family
from ..terminal import track
from . import cache_key

log = logging.getLogger(__name__)


def class_folder(cfg: DictConfig, family: Family) -> str | None:
    """Where the class pictures are (a folder, or a URL of one), drawn now if need be; None without a prior."""
    if cfg.prior.kind is enums.PriorKind.none:
        return None
    if cfg.prior.source is enums.PriorSource.folder:
        return str(cfg.prior.path)
    return str(cfg.dataset.path if cfg.prior.source is enums.PriorSource.captions else generate(cfg, family))


def generate(cfg: DictConfig, family: Family) -> Path:
    """A folder of exactly `count` pictures that the base model draws from the class prompt.

    Picture i depends on what is asked and on (seed, i), not on its batch, and is kept under the cache root: a broken-off
    generation goes on where it stopped, the next run draws nothing, and a larger count draws only what is missing.
    """
    asked = cfg.prior.generated
    if cfg.dataset.long_captions is enums.LongCaptions.chunk:
        family.fit_chunks([cfg.prior.prompt, asked.negative_prompt])
    store = Path(cfg.cache).expanduser() / "class_pictures" / _key(cfg, family)
    store.mkdir(parents=True, exist_ok=True)
    absent = [i for i in range(asked.count) if not _picture(store, i).is_file()]
    if absent:
        log.info("class pictures: %d are kept, %d to draw, in %s", asked.count - len(absent), len(absent), store)
        _draw(cfg, family, store, absent)
    return _first(store, asked.count)


def _key(cfg: DictConfig, family: Family) -> str:
    asked = {name: value for name, value in cfg.prior.generated.items() if name not in ("count", "batch_size")}
    model = (family.denoiser_identity(), family.text_identity(), family.image_identity())
    return cache_key.key("class pictures", cfg.prior.prompt, repr(sorted(asked.items())), *model)


def _picture(store: Path, i: int) -> Path:
    return store / f"{i:05d}.png"


def _draw(cfg: DictConfig, family: Family, store: Path, absent: list[int]) -> None:
    asked = cfg.prior.generated
    text, negative = family.encode_text([cfg.prior.prompt]), family.encode_text([asked.negative_prompt or None])
    family.release_encoders()
    batches = [absent[first : first + asked.batch_size] for first in range(0, len(absent), asked.batch_size)]
    for numbers in track(batches, "drawing class pictures", hidden=not cfg.trainer.progress):
        seeds = [draw.torch_seed(asked.seed, i, Purpose.CLASS_PICTURE) for i in numbers]
        pictures = family.generate(
            text.repeat(len(numbers)), negative.repeat(len(numbers)), height=asked.resolution, width=asked.resolution,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=asked.num_inference_steps, guidance_scale=asked.guidance_scale,
        )  # fmt: skip
        for i, picture in zip(numbers, pictures, strict=True):
            _save(picture, _picture(store, i))
    family.release_encoders()


def _save(picture: Any, path: Path) -> None:
    """Whole or not at all."""
    aside = path.with_suffix(f".{os.getpid()}.part")
    picture.save(aside, "PNG")
    aside.replace(path)


def _first(store: Path, count: int) -> Path:
    """A folder of links to the first `count` pictures; where links can't be made, of copies."""
    folder = store / f"first_{count}"
    folder.mkdir(exist_ok=True)
    for i in range(count):
        link = _picture(folder, i)
        if not link.is_file():
            link.unlink(missing_ok=True)  # a link to nothing
            try:
                link.symlink_to(_picture(store, i).resolve())
            except OSError:
                link.write_bytes(_picture(store, i).read_bytes())
    return folder
