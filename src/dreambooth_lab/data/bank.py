"""The target bank: the base model's answers at fixed draws of (x_0, ε, t) per class picture, made before training.

A class row then takes one of its picture's draws, and its target is read like a latent: a teacher without a forward pass, for
any adapter, full-rank training included. The number of draws limits how many different noises a picture is seen at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from .. import draw
from ..batch import Cond, Size, Text, stack_text
from ..diffusion.time import Times
from ..draw import Purpose
from ..models.family import Family
from . import cache, choices
from .cached import Cached
from .entry import Entry


class Item(NamedTuple):
    """A cached variant of a class picture, and what the model is told of it."""

    latents: str  # key of its latents
    size: Size


def item(cached: Cached, entry: Entry, which: int) -> Item:
    return Item(cached.key(entry, which), entry.variants[which].size())


class Bank:
    """Answers by (item, number of the draw).

    Args:
        latents: the latent cache, filled.
        caption, text: of the class, as every class row has them.
        times: the distribution of t that training draws from.
    """

    def __init__(self, cfg: DictConfig, family: Family, latents: cache.Store, caption: str, text: Text, times: Times):
        self.cfg, self.family, self.latents, self.caption, self.text, self.times = cfg, family, latents, caption, text, times
        self.draws = int(cfg.prior.bank.draws)
        self.answers = cache.Store(latents.folder.parent, "bank")
        self.built = 0
        self.made_by = cache.key(
            family.denoiser_identity(), family.text_identity(), caption, str(cfg.seed), str(self.draws),
            repr(sorted(vars(times).items())), repr((cfg.objective.noise_offset, cfg.objective.noise_offset_probability)),
        )  # fmt: skip

    def key(self, item: Item, number: int) -> str:
        return cache.key("bank", self.made_by, item.latents, repr(item.size), str(number))

    def index(self, item: Item, number: int) -> int:
        """What the fixed draws are keyed by, instead of a sample index; far above any of those."""
        return 2**62 + int(cache.key(item.latents, str(number))[:15], 16)

    def u(self, item: Item, number: int) -> float:
        """U[0,1), one in each of `draws` equal parts."""
        return (number + draw.uniform(self.cfg.seed, self.index(item, number), Purpose.TIME)) / self.draws

    def pick(self, sample: int) -> int:
        """Which draw a sample takes."""
        return int(draw.uniform(self.cfg.seed, sample, Purpose.BANK) * self.draws)

    def read(self, item: Item, number: int) -> Tensor:
        """The base model's answer [C h w]."""
        return self.answers.read(self.key(item, number))["answer"]

    def fill(self, items: list[Item]) -> None:
        """Make what is missing or damaged; the denoiser must be the base model now."""
        absent = [(i, n) for i in dict.fromkeys(items) for n in range(self.draws) if not self.answers.intact(self.key(i, n))]
        by_shape: dict[tuple[int, int], list[tuple[Item, int]]] = {}
        for item, number in absent:
            by_shape.setdefault(item.size.target, []).append((item, number))
        rows = self.cfg.prior.bank.batch_size
        batches = [some[first : first + rows] for some in by_shape.values() for first in range(0, len(some), rows)]
        for batch in track(batches, "filling the target bank", disable=not (batches and self.cfg.trainer.progress)):
            self._answer(batch)
        self.built = len(absent)

    @torch.no_grad()
    def _answer(self, batch: list[tuple[Item, int]]) -> None:
        posteriors = [self.latents.read(item.latents) for item, _ in batch]
        indices = [self.index(item, number) for item, number in batch]
        shape = tuple(posteriors[0]["mean"].shape)
        z = [draw.normal(self.cfg.seed, index, Purpose.POSTERIOR, shape) for index in indices]
        x0 = torch.stack([p["mean"] + p["std"] * noise for p, noise in zip(posteriors, z, strict=True)])
        eps = torch.stack([choices.noise(self.cfg, index, shape) for index in indices])
        t = self.times(torch.tensor([self.u(item, number) for item, number in batch], dtype=torch.float64))
        cond = self.family.cond(stack_text([self.text] * len(batch)), [item.size for item, _ in batch])
        device = self.family.device
        answers = self.family.denoise(self.family.path.noise(x0, eps, t).to(device), t.to(device), _to(cond, device))
        for (item, number), answer in zip(batch, answers.cpu(), strict=True):
            self.answers.write(self.key(item, number), {"answer": answer})


def _to(cond: Cond, device: torch.device) -> Cond:
    return Cond(*(part.to(device) for part in cond))
