"""From rows to batches: cached values stacked, with every random choice drawn. Nothing random happens after this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from .. import draw
from ..batch import Batch, Kinds, Shown, Size, Text
from ..config import RolloutKind
from ..draw import Purpose
from ..models.family import Family
from . import choices
from .bank import Bank, item
from .cached import Cached
from .entry import Entry
from .sampler import Row


class Drawn(NamedTuple):
    """One row of a batch."""

    mean: Tensor  # [C h w]
    std: Tensor  # [C h w]
    size: Size
    caption: str
    mask: Tensor | None  # [1 h w]
    keyed: int  # what x_0 and ε are drawn by: the sample, or a fixed draw of the bank
    u: float  # becomes t
    taught: Tensor | None  # [C h w], the bank's answer


class Assembler:
    """Builds batches.

    Args:
        entries: what rows refer to.
        bank: answers for class rows, if there is one.
    """

    def __init__(self, cfg: DictConfig, family: Family, cached: Cached, entries: Sequence[Entry], bank: Bank | None):
        self.cfg, self.family, self.cached, self.entries, self.bank = cfg, family, cached, entries, bank

    def __call__(self, rows: Sequence[Row], kinds: Kinds | None = None) -> Batch:
        """Rows of one shape.

        Args:
            kinds: of the whole optimiser step; None if these rows are all of it.
        """
        seed, samples = self.cfg.seed, [row.sample for row in rows]
        drawn = [self._row(row) for row in rows]
        mean, std = torch.stack([row.mean for row in drawn]), torch.stack([row.std for row in drawn])
        keyed, shape = [row.keyed for row in drawn], tuple(mean.shape[1:])

        def normal(purpose: Purpose, indices: list[int]) -> Tensor:
            return torch.stack([draw.normal(seed, index, purpose, shape) for index in indices])

        perturbed = self.cfg.rollout.enabled and self.cfg.rollout.kind is RolloutKind.input_perturbation
        is_class = torch.tensor([self.entries[row.entry].spec.is_class for row in rows])
        taught = [row.taught for row in drawn if row.taught is not None]
        return Batch(
            sample=torch.tensor(samples),
            mean=mean,
            std=std,
            z=normal(Purpose.POSTERIOR, keyed),
            eps=torch.stack([choices.noise(self.cfg, index, shape) for index in keyed]),
            u=torch.tensor([row.u for row in drawn], dtype=torch.float64),
            walk=choices.walk(self.cfg, samples),
            xi=normal(Purpose.PERTURBATION, samples) if perturbed else None,
            cond=self.family.cond(
                Text.stack([self.cached.text(row.caption) for row in drawn]),
                [Shown(row.size, row.mean, seed, row.keyed, self.cfg.dataset.aesthetic_score) for row in drawn],
            ),
            captions=tuple(row.caption for row in drawn),
            instance_rows=(~is_class).nonzero()[:, 0],
            class_rows=is_class.nonzero()[:, 0],
            kinds=kinds or self.kinds(rows, 1),
            mask=choices.drop_masks(self.cfg, samples, _stack_masks([row.mask for row in drawn], mean)),
            taught=torch.stack(taught) if taught else None,
        )

    def kinds(self, rows: Sequence[Row], parts: int) -> Kinds:
        """Of the rows of an optimiser step that comes in so many micro-batches."""
        classes = sum(self.entries[row.entry].spec.is_class for row in rows)
        return Kinds((len(rows) - classes) / parts, classes / parts)

    def _row(self, row: Row) -> Drawn:
        entry, seed, sample = self.entries[row.entry], self.cfg.seed, row.sample
        which = int(draw.uniform(seed, sample, Purpose.VARIANT) * len(entry.variants))
        posterior, mask = self.cached.posterior(entry, which), self.cached.mask(entry, which)
        keyed, u, taught = sample, None, None
        if self.bank and entry.spec.is_class:
            asked, number = item(self.cached, entry, which), self.bank.pick(sample)
            keyed, u, taught = self.bank.index(asked, number), self.bank.u(asked, number), self.bank.read(asked, number)
        u = draw.uniform(seed, sample, Purpose.TIME) if u is None else u
        size, caption = entry.variants[which].size(), self.caption(sample, entry)
        return Drawn(posterior["mean"], posterior["std"], size, caption, mask, keyed, u, taught)

    def caption(self, sample: int, entry: Entry) -> str:
        """One of the picture's; dropped for a share of the instance rows, while class rows keep what they preserve."""
        seed, share = self.cfg.seed, self.cfg.dataset.caption_dropout
        if not entry.spec.is_class and draw.uniform(seed, sample, Purpose.CAPTION_DROPOUT) < share:
            return ""
        return entry.captions[int(draw.uniform(seed, sample, Purpose.CAPTION) * len(entry.captions))]


def _stack_masks(masks: list[Tensor | None], like: Tensor) -> Tensor | None:
    """[B 1 h w], ones where a row has none; None if no row has one."""
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones_like(like[0, :1]) if mask is None else mask for mask in masks])
