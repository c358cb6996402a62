"""Reading the caches while training; an entry that is found damaged is made again."""

from __future__ import annotations

from torch import Tensor

from ..batch import Text
from ..config import ConfigError
from . import cache
from .entry import Entry
from .fill import Encoder, Stores, fill_masks, fill_texts, heal


class Cached:
    """What the caches hold of a run's pictures and captions.

    Args:
        encoder: the image encoder, with its identity.
        text_identity: of the text encoders.
    """

    def __init__(self, stores: Stores, encoder: Encoder, text_identity: str):
        self.stores, self.encoder, self.family, self.text_identity = stores, encoder, encoder.family, text_identity

    def fill_texts(self, captions: set[str], progress: bool) -> None:
        """Encode the captions that are not cached."""
        fill_texts(self.stores, self.family, {caption: self._text_key(caption) for caption in captions}, progress)
        self.family.release_encoders()

    def _text_key(self, caption: str) -> str:
        return cache.key("text", caption, self.text_identity)

    def text(self, caption: str) -> Text:
        """What the base model's encoders say about a caption, one row; it was among those filled."""
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
            ConfigError: they are damaged, and the picture is gone.
        """
        key = self.key(entry, which)
        try:
            return self.stores.latents(entry).read(key)
        except cache.Damaged:
            heal(self.stores, entry, which, self.encoder)
            return self.stores.latents(entry).read(key)

    def mask(self, entry: Entry, which: int) -> Tensor | None:
        """A variant's mask [1 h w] in [0, 1].

        Raises:
            ConfigError: it is damaged, and the picture's mask is gone.
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
                raise ConfigError(f"a cached mask is damaged, and can't be made again: {problems[0]}") from None
            return self.stores.masks.read(key)["mask"]
