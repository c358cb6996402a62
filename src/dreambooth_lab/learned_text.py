"""What a run teaches the text encoders: the rare token's embedding, adapters, or both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .batch import Text
from .embedding import TokenEmbedding
from .models.family import Family


class LearnedText(nn.Module):
    """Text encoders of the run's own, in memory while it trains; the family's remain the base's, and so do cached texts.

    Args:
        word: the token whose embedding learns, or None.
        adapted: whether the encoders get adapters, so that every caption changes its meaning.
    """

    def __init__(self, family: Family, word: str | None, adapted: bool):
        super().__init__()
        self.family, self.adapted = family, adapted
        self.pairs = family.load_text_encoders()
        encoders = (encoder for _, encoder in self.pairs)
        self.encoders = nn.ModuleDict(dict(zip(family.text_encoder_parts, encoders, strict=True)))
        self.token = TokenEmbedding(word, family.token_slots(word, self.pairs)) if word else None

    def changes(self, caption: str) -> bool:
        """Whether training may change what a caption means."""
        return self.adapted or (self.token is not None and self.token.occurs_in(caption))

    def read(self, captions: Sequence[str]) -> Text:
        """What captions mean by now, differentiable."""
        return self.family.read_text(captions, self.pairs)

    def encode(self, captions: Sequence[str]) -> Text:
        """What captions mean by now, to keep: without gradient, on the CPU."""
        return self.family.encode_text(captions, self.pairs)
