"""The eval datasets: images that are never trained on, evaluated in the same way every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import draw
from ..batch import Batch, ImageInfo, RowCounts, Text
from ..draw import Purpose
from . import cache_key
from .module import DreamBoothData
from .preparation.entry import Entry

SEED = 0  # not the run's seed: the jobs of a sweep over seeds are compared with the same noise


class EvalBatch(NamedTuple):
    """Rows of one shape, the same ones every time."""

    batch: Batch  # u [B]: the middle of the row's stratum, as a share of the model's own range of timesteps
    rows: tuple[tuple[str, str], ...]  # dataset id, image


def as_it_is(caption: str) -> str | None:
    return caption


def eval_batches(
    data: DreamBoothData, times: int, batch_size: int, word: Callable[[str], str | None] = as_it_is
) -> list[EvalBatch]:
    """Every eval image at `times` evenly spaced timesteps, with noise that is a function only of its bytes and the timestep.

    No image is dropped, mirrored or masked, and no caption is dropped: of several captions, the first is used.

    Args:
        batch_size: maximum number of rows of an evaluation batch.
        word: caption → another one, which must be one of the run's; None omits the image.
    """
    by_shape: dict[tuple[int, int], list[tuple[Entry, int]]] = {}
    for entry in (entry for entry in data.held_out if word(entry.captions[0]) is not None):
        by_shape.setdefault(entry.shape, []).extend((entry, k) for k in range(times))
    parts = [rows[i : i + batch_size] for rows in by_shape.values() for i in range(0, len(rows), batch_size)]
    return [_eval_batch(data, rows, times, word) for rows in parts]


def _eval_batch(data: DreamBoothData, rows: list[tuple[Entry, int]], times: int, word: Callable[[str], str | None]) -> EvalBatch:
    posteriors = [data.cache_reader.posterior(entry, 0) for entry, _ in rows]
    mean = torch.stack([p["mean"] for p in posteriors])
    index = [int(cache_key.key(entry.picture.digest, str(k))[:15], 16) for entry, k in rows]
    noise = torch.stack([draw.normal(SEED, i, Purpose.EVALUATION, (2, *mean.shape[1:])) for i in index])
    shown = [
        ImageInfo(e.variants[0].size(), own, SEED, i, data.cfg.dataset.aesthetic_score)
        for (e, _), own, i in zip(rows, mean, index, strict=True)
    ]
    captions = tuple(word(entry.captions[0]) or "" for entry, _ in rows)
    batch = Batch(
        sample=torch.tensor(index), mean=mean, std=torch.stack([p["std"] for p in posteriors]), z=noise[:, 0], eps=noise[:, 1],
        u=torch.tensor([(k + 0.5) / times for _, k in rows], dtype=torch.float64),
        rollout_draws=torch.zeros(len(rows), 2), xi=None,
        cond=data.family.cond(Text.stack([data.text(text) for text in captions]), shown),
        captions=captions, instance_rows=torch.arange(len(rows)), class_rows=torch.arange(0),
        row_counts=RowCounts(len(rows), 0), mask=None, teacher_output=None,
    )  # fmt: skip
    return EvalBatch(batch, tuple((entry.spec.id, entry.picture.name) for entry, _ in rows))
