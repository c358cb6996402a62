"""The target bank: the base model's predictions at fixed draws of (x_0, ε, t) per class image, computed before training.

A class row then takes one of its image's draws, and its target is read from the cache like a latent: a teacher without a forward
pass, for any adapter, including full fine-tuning. The number of draws limits how many different noises are used with an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from ... import draw
from ...batch import ImageInfo, Size, Text
from ...config import ConfigError
from ...diffusion.time import Times
from ...draw import Purpose
from ...models.family import Family
from ...terminal import track
from .. import cache_key, row_draws
from ..preparation.entry import Entry
from . import cache
from .reader import CacheReader


class Item(NamedTuple):
    """A cached variant of a class image, its size conditioning and its caption."""

    latents: str  # key of its latents
    size: Size
    caption: str


def item(cache_reader: CacheReader, entry: Entry, which: int, caption: str) -> Item:
    return Item(cache_reader.key(entry, which), entry.variants[which].size(), caption)


class Bank:
    """Cached predictions of the base model by (item, index of the draw).

    Args:
        latents: the latent cache, filled.
        texts: the cached text of a caption.
        times: the training distribution of t.
    """

    def __init__(self, cfg: DictConfig, family: Family, latents: cache.Store, texts: Callable[[str], Text], times: Times):
        self.cfg, self.family, self.latents, self.texts, self.times = cfg, family, latents, texts, times
        self.score = cfg.dataset.aesthetic_score
        self.draws = int(cfg.prior.bank.draws)
        self.targets = cache.Store(latents.folder.parent, "bank")
        self.built = 0
        self.model = family.denoiser_identity(), family.text_identity()

    def made_by(self, caption: str) -> str:
        """Key of all that the predictions for a caption depend on besides the item."""
        offset = repr((self.cfg.objective.noise_offset, self.cfg.objective.noise_offset_probability))
        return cache_key.key(*self.model, caption, str(self.cfg.seed), str(self.draws), str(self.score), offset)

    def key(self, item: Item, number: int) -> str:
        times = self.times.describe(self._cells(item))
        return cache_key.key("bank", self.made_by(item.caption), times, item.latents, repr(item.size), str(number))

    def _cells(self, item: Item) -> tuple[int, int]:
        """Height and width of an item's latents."""
        height, width = item.size.target
        return height // self.family.factor, width // self.family.factor

    def index(self, item: Item, number: int) -> int:
        """The key of the fixed draws, instead of a sample index; far above all sample indices."""
        return 2**62 + int(cache_key.key(item.latents, str(number))[:15], 16)

    def u(self, item: Item, number: int) -> float:
        """Stratified U[0,1): one in each of `draws` equal parts."""
        return (number + draw.uniform(self.cfg.seed, self.index(item, number), Purpose.TIME)) / self.draws

    def pick(self, sample: int) -> int:
        """The draw of a sample."""
        return int(draw.uniform(self.cfg.seed, sample, Purpose.BANK) * self.draws)

    def read(self, item: Item, number: int) -> Tensor:
        """The base model's prediction [C h w].

        Raises:
            ConfigError: it was damaged after `fill`, and can't be computed again while the model is being trained.
        """
        key = self.key(item, number)
        try:
            return self.targets.read(key)["answer"]
        except cache.Damaged as error:
            self.targets.drop(key)
            raise ConfigError(
                f"the target bank was damaged during training ({error}); resume the run, which rebuilds it"
            ) from error

    def fill(self, items: list[Item]) -> None:
        """Compute missing or damaged entries; the denoiser must still be the base model.

        The last bits of a prediction depend on the other rows of its batch, so an item's draws are always computed in the same
        batches: a recomputed entry is bit-identical, whatever else is missing.
        """
        rows = self.cfg.prior.bank.batch_size
        together = [range(first, min(first + rows, self.draws)) for first in range(0, self.draws, rows)]
        lacking = {
            (item, numbers): absent
            for item in dict.fromkeys(items) for numbers in together if (absent := self._absent(item, numbers))
        }  # fmt: skip
        hidden = not (lacking and self.cfg.trainer.progress)
        for (item, numbers), absent in track(lacking.items(), "filling the target bank", hidden=hidden):
            for number, prediction in zip(numbers, self._predictions(item, numbers), strict=True):
                if number in absent:
                    self.targets.write(self.key(item, number), {"answer": prediction})
        self.built = sum(map(len, lacking.values()))

    def _absent(self, item: Item, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if not self.targets.is_intact(self.key(item, number))]

    @torch.no_grad()
    def _predictions(self, item: Item, numbers: Sequence[int]) -> Tensor:
        """The network's predictions for some of an item's draws [B C h w]."""
        posterior = self.latents.read(item.latents)
        indices = [self.index(item, number) for number in numbers]
        shape = tuple(posterior["mean"].shape)
        z = torch.stack([draw.normal(self.cfg.seed, index, Purpose.POSTERIOR, shape) for index in indices])
        x0 = posterior["mean"] + posterior["std"] * z
        eps = torch.stack([row_draws.noise_draws(self.cfg, index, shape) for index in indices])
        t = self.times(torch.tensor([self.u(item, number) for number in numbers], dtype=torch.float64), self._cells(item))
        shown = [ImageInfo(item.size, posterior["mean"], self.cfg.seed, index, self.score) for index in indices]
        cond = self.family.cond(Text.stack([self.texts(item.caption)] * len(numbers)), shown)
        device = self.family.device
        return self.family.denoise(self.family.path.noise(x0, eps, t).to(device), t.to(device), cond.to(device)).cpu()
