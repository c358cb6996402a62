"""Training of the text encoders: the rare token's embedding, adapters, or both."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .batch import Caption, Text, WithoutWaiting
from .embedding import TokenEmbedding
from .models.family import Family


class TrainableText(nn.Module):
    """A trainable copy of the text encoders. The family's encoders and the cached text embeddings remain those of the base model.

    Args:
        word: the token whose embedding is trained, or None.
        adapted: whether the encoders get adapters, so that the embeddings of every caption change.
    """

    def __init__(self, family: Family, word: str | None, adapted: bool):
        super().__init__()
        self.family, self.adapted = family, adapted
        self.pairs = family.load_text_encoders()
        encoders = (encoder for _, encoder in self.pairs)
        self.encoders = nn.ModuleDict(dict(zip(family.text_encoder_parts, encoders, strict=True)))
        self.token = TokenEmbedding(word, family.token_slots(word, self.pairs)) if word else None

    def changes(self, caption: Caption) -> bool:
        """Whether training can change a caption's embeddings."""
        return self.adapted or (self.token is not None and caption is not None and self.token.occurs_in(caption))

    def read(self, captions: Sequence[Caption]) -> Text:
        """Encode captions with the current weights, differentiable."""
        with WithoutWaiting():
            return self.family.read_text(captions, self.pairs)

    def encode(self, captions: Sequence[Caption]) -> Text:
        """Encode captions with the current weights, without gradient, on the CPU."""
        return self.family.encode_text(captions, self.pairs)
