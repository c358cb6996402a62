"""The work of `tools.rank_prompts`: generate, score, compare pairwise, write."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.table import Table

from .. import sheet
from ..callbacks.scores import interval
from ..config import ConfigError
from ..data import planning
from ..data.module import photos_of
from ..data.preparation.entry import Collector
from ..data.preparation.problems import raise_problems
from ..models.family import Family
from ..models.feature_extractors import Clip, Dino, FeatureExtractor, MaskedDino, Photo
from ..storage.durable import write_text
from .common import base_model

SHOWN = 6  # photos in the sheet's first row


class Measure(NamedTuple):
    """A prompt by one metric."""

    values: list[float]  # one per image, or for clip_t one per photo; the n-th values of two prompts are a pair
    mean: float
    low: float  # 95 % interval of the mean, by Student's t; nan for fewer than three values
    high: float
    behind: float  # paired difference of the best prompt's mean from this one's
    behind_low: float
    behind_high: float


class Ranked(NamedTuple):
    prompts: list[str]  # the best first
    by: str
    measures: dict[str, dict[str, Measure]]  # metric → prompt → its values
    pictures: dict[str, list[Image.Image]]
    photos: list[Photo]


def rank(cfg: DictConfig, prompts: Sequence[str], by: str) -> Ranked:
    """Generate images for the prompts with the base model and compare them with the photos.

    Raises:
        ConfigError: there are no photos, or no such metric model.
    """
    family = base_model.load(cfg)
    photos = _photos(cfg, family)
    clip, extractors = _extractors(cfg, family.device)
    if by not in [*extractors, "clip_t"]:
        raise ConfigError(f"--by is {by}, but eval.dino_model is null; name a DINO, set eval=paper, or use --by=clip_i")
    drawn = dict(zip(prompts, base_model.images(cfg, family, prompts), strict=True))
    values = {"clip_t": _texts(clip, prompts, photos)} | {
        name: _images(extractor, drawn, photos) for name, extractor in extractors.items()
    }
    measures = {name: compared(found) for name, found in values.items()}
    order = sorted(prompts, key=lambda prompt: -measures[by][prompt].mean)
    return Ranked(order, by, measures, drawn, photos)


def _photos(cfg: DictConfig, family: Family) -> list[Photo]:
    plan = planning.plan(cfg, None)
    collected = Collector(family.stride, Path(cfg.cache).expanduser()).collect(plan.specs)
    raise_problems(plan.specs, collected.entries, collected.rejected, collected.problems)
    return photos_of(entry for entry in collected.entries if not entry.spec.is_eval)


def _extractors(cfg: DictConfig, device: torch.device) -> tuple[Clip, dict[str, FeatureExtractor | MaskedDino]]:
    if not cfg.eval.clip_model:
        raise ConfigError(
            "eval.clip_model is null, but prompts are ranked by CLIP; set eval=paper, or a folder or hub id of a CLIP"
        )
    clip = Clip(cfg.eval.clip_model, "eval.clip_model", device, cfg.eval.batch_size)
    if not cfg.eval.dino_model:
        return clip, {"clip_i": clip}
    dino = Dino(cfg.eval.dino_model, "eval.dino_model", device, cfg.eval.batch_size)
    return clip, {"clip_i": clip, "dino": dino, "dino_masked": MaskedDino(dino)}


def _images(
    extractor: FeatureExtractor | MaskedDino, drawn: dict[str, list[Image.Image]], photos: Sequence[Photo]
) -> dict[str, list[float]]:
    """Each image's mean cosine with the photos."""
    ours = extractor.embed_photos(photos)
    return {prompt: (extractor.embed(row) @ ours.T).mean(1).tolist() for prompt, row in drawn.items()}


def _texts(clip: Clip, prompts: Sequence[str], photos: Sequence[Photo]) -> dict[str, list[float]]:
    """Each photo's cosine with the prompt."""
    cosines = clip.embed_texts(prompts) @ clip.embed_photos(photos).T
    return dict(zip(prompts, cosines.tolist(), strict=True))


def compared(values: dict[str, list[float]]) -> dict[str, Measure]:
    """Means with intervals, and the paired differences from the best."""
    best = max(values.values(), key=fmean)
    made = {}
    for prompt, own in values.items():
        apart = [there - here for there, here in zip(best, own, strict=True)]
        made[prompt] = Measure(own, fmean(own), *interval(own), fmean(apart), *interval(apart))
    return made


def write(ranked: Ranked, folder: Path) -> None:
    """Write the tables, the sheet and the images; print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(ranked.prompts):
        for k, picture in enumerate(ranked.pictures[prompt]):
            sheet.save(picture, folder / "images" / f"{i:02d}_{k:02d}.png")
    _csv(folder / "ranks.csv", ("rank", "prompt", "metric", "mean", "low", "high", "behind", "behind_low", "behind_high"), [
        (place, prompt, name, *of[prompt][1:])
        for place, prompt in enumerate(ranked.prompts, 1) for name, of in ranked.measures.items()
    ])  # fmt: skip
    _csv(folder / "scores.csv", ("prompt", "metric", "number", "value"), [
        (prompt, name, number, value)
        for prompt in ranked.prompts for name, of in ranked.measures.items() for number, value in enumerate(of[prompt].values)
    ])  # fmt: skip
    sheet.save(sheet.draw(_rows(ranked)), folder / "sheet.png")
    Console().print(_table(ranked))


def _csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([head, *rows])
    write_text(path, text.getvalue())


def _rows(ranked: Ranked) -> list[sheet.Row]:
    """A sheet of the photos and each prompt's images."""
    own = ranked.measures[ranked.by]
    drawn = [
        sheet.Row(f"{i}. {prompt}: {ranked.by} {own[prompt].mean:.3f}", ranked.pictures[prompt])
        for i, prompt in enumerate(ranked.prompts, 1)
    ]
    return [sheet.Row("the photos", [photo.image for photo in ranked.photos[:SHOWN]]), *drawn]


def _table(ranked: Ranked) -> Table:
    others = [name for name in ranked.measures if name != ranked.by]
    table = Table("", "prompt", f"{ranked.by}, 95 %", "behind the best, 95 %", *others)
    for i, prompt in enumerate(ranked.prompts, 1):
        one = ranked.measures[ranked.by][prompt]
        behind = "" if i == 1 else f"{one.behind:.3f} [{one.behind_low:+.3f}, {one.behind_high:+.3f}]"
        rest = (f"{ranked.measures[name][prompt].mean:.3f}" for name in others)
        table.add_row(str(i), prompt, f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]", behind, *rest)
    return table
