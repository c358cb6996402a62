"""From rows to batches: cached values stacked, with every random choice drawn. Nothing random happens after this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from ... import draw
from ...batch import Batch, ImageInfo, RowCounts, Size, Text
from ...config import enums
from ...draw import Purpose
from ...models.family import Family
from .. import row_draws
from ..caching.bank import Bank, item
from ..caching.reader import CacheReader
from ..preparation.entry import Entry
from .schedule import Row


class RowTensors(NamedTuple):
    """One row of a batch."""

    mean: Tensor  # [C h w]
    std: Tensor  # [C h w]
    size: Size
    caption: str
    mask: Tensor | None  # [1 h w]
    keyed: int  # the key of the draws of x_0 and ε: the sample, or a fixed draw of the bank
    u: float  # becomes t
    teacher_output: Tensor | None  # [C h w], the base model's cached prediction


class Assembler:
    """Builds batches.

    Args:
        entries: the entries that rows refer to.
        bank: targets of class rows, or None.
        class_share: average share of class rows.
    """

    def __init__(
        self, cfg: DictConfig, family: Family, cache_reader: CacheReader, entries: Sequence[Entry], bank: Bank | None,
        class_share: float,
    ):  # fmt: skip
        self.cfg, self.family, self.cached, self.entries, self.bank = cfg, family, cache_reader, entries, bank
        self.class_share = class_share

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Rows of one shape."""
        seed, samples = self.cfg.seed, [row.sample for row in rows]
        drawn = [self._sample(row) for row in rows]
        mean, std = torch.stack([row.mean for row in drawn]), torch.stack([row.std for row in drawn])
        keyed, shape = [row.keyed for row in drawn], tuple(mean.shape[1:])

        def normal(purpose: Purpose, indices: list[int]) -> Tensor:
            return torch.stack([draw.normal(seed, index, purpose, shape) for index in indices])

        perturbed = self.cfg.rollout.enabled and self.cfg.rollout.kind is enums.RolloutKind.input_perturbation
        is_class = torch.tensor([self.entries[row.entry].spec.is_class for row in rows])
        taught = [row.teacher_output for row in drawn if row.teacher_output is not None]
        return Batch(
            sample=torch.tensor(samples),
            mean=mean,
            std=std,
            z=normal(Purpose.POSTERIOR, keyed),
            eps=torch.stack([row_draws.noise_draws(self.cfg, index, shape) for index in keyed]),
            u=torch.tensor([row.u for row in drawn], dtype=torch.float64),
            rollout_draws=row_draws.rollout_draws(self.cfg, samples),
            xi=normal(Purpose.PERTURBATION, samples) if perturbed else None,
            cond=self.family.cond(
                Text.stack([self.cached.text(row.caption) for row in drawn]),
                [ImageInfo(row.size, row.mean, seed, row.keyed, self.cfg.dataset.aesthetic_score) for row in drawn],
            ),
            captions=tuple(row.caption for row in drawn),
            instance_rows=(~is_class).nonzero()[:, 0],
            class_rows=is_class.nonzero()[:, 0],
            row_counts=RowCounts.expected(len(rows), self.class_share),
            mask=row_draws.drop_masks(self.cfg, samples, _stack_masks([row.mask for row in drawn], mean)),
            teacher_output=torch.stack(taught) if taught else None,
        )

    def _sample(self, row: Row) -> RowTensors:
        entry, seed, sample = self.entries[row.entry], self.cfg.seed, row.sample
        which = int(draw.uniform(seed, sample, Purpose.VARIANT) * len(entry.variants))
        posterior, mask = self.cached.posterior(entry, which), self.cached.mask(entry, which)
        keyed, u, taught, caption = sample, None, None, self.caption(sample, entry)
        if self.bank and entry.spec.is_class:
            asked, number = item(self.cached, entry, which, caption), self.bank.pick(sample)
            keyed, u, taught = self.bank.index(asked, number), self.bank.u(asked, number), self.bank.read(asked, number)
        u = draw.uniform(seed, sample, Purpose.TIME) if u is None else u
        return RowTensors(posterior["mean"], posterior["std"], entry.variants[which].size(), caption, mask, keyed, u, taught)

    def caption(self, sample: int, entry: Entry) -> str:
        """One of the image's captions; dropped for a share of the instance rows, never for class rows."""
        seed, share = self.cfg.seed, self.cfg.dataset.caption_dropout
        if not entry.spec.is_class and draw.uniform(seed, sample, Purpose.CAPTION_DROPOUT) < share:
            return ""
        return entry.captions[int(draw.uniform(seed, sample, Purpose.CAPTION) * len(entry.captions))]


def _stack_masks(masks: list[Tensor | None], like: Tensor) -> Tensor | None:
    """Masks [B 1 h w], ones for rows without a mask; None if no row has one."""
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones_like(like[0, :1]) if mask is None else mask for mask in masks])
