"""Read the caches while training; damaged entries are rebuilt."""

from __future__ import annotations

from torch import Tensor

from ...batch import Caption, Text
from ...config import ConfigError
from .. import cache_key
from ..preparation.entry import Entry
from . import cache
from .fill import Encoder, Stores, fill_masks, fill_texts, rebuild


class CacheReader:
    """Reads the cached latents, masks and text embeddings of a run.

    Args:
        encoder: the image encoder, with its identity.
        text_identity: of the text encoders.
    """

    def __init__(self, stores: Stores, encoder: Encoder, text_identity: str):
        self.stores, self.encoder, self.family, self.text_identity = stores, encoder, encoder.family, text_identity

    def fill_texts(self, captions: set[Caption], progress: bool) -> None:
        """Encode the captions that are not cached."""
        fill_texts(self.stores, self.family, {caption: self._text_key(caption) for caption in captions}, progress)
        self.family.release_encoders()

    def _text_key(self, caption: Caption) -> str:
        parts = ("unconditional",) if caption is None else ("text", caption)
        return cache_key.key(*parts, self.text_identity)

    def text(self, caption: Caption) -> Text:
        """The base model's text embeddings of a caption, one row; the caption must be in the filled cache."""
        key = self._text_key(caption)
        try:
            return Text(self.stores.texts.read(key))
        except cache.Damaged:
            self.stores.texts.drop(key)
            self.fill_texts({caption}, False)
            return Text(self.stores.texts.read(key))

    def key(self, entry: Entry, which: int) -> str:
        return entry.key(which, self.encoder.identity)

    def posterior(self, entry: Entry, which: int) -> dict[str, Tensor]:
        """A variant's mean and std [C h w].

        Raises:
            ConfigError: they are damaged, and the image no longer exists.
        """
        key = self.key(entry, which)
        try:
            return self.stores.latents(entry).read(key)
        except cache.Damaged:
            rebuild(self.stores, entry, which, self.encoder)
            return self.stores.latents(entry).read(key)

    def mask(self, entry: Entry, which: int) -> Tensor | None:
        """A variant's mask [1 h w] in [0, 1].

        Raises:
            ConfigError: it is damaged, and the image's mask no longer exists.
        """
        if entry.mask is None:
            return None
        key = entry.mask.key(entry.variants[which], self.family.factor)
        try:
            return self.stores.masks.read(key)["mask"]
        except cache.Damaged:
            self.stores.masks.drop(key)
            _, problems = fill_masks(self.stores, [entry], self.family.factor)
            if problems:
                raise ConfigError(f"a cached mask is damaged, and can't be rebuilt: {problems[0]}") from None
            return self.stores.masks.read(key)["mask"]
