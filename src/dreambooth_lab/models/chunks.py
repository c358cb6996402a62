"""Captions longer than a text encoder takes: counted, or read in pieces of 75 tokens by encoders of CLIP's, as other trainers do.

Each piece has its own start and end; the pieces' states follow each other, and what is pooled is the first piece's. A caption of
one piece is read as it always is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..batch import Text

SPECIAL = 2  # tokens of CLIP's that are not the caption's: its start and its end
STATES = "prompt_embeds"  # the tensor that has a state for each token


class Piece:
    """A CLIP tokenizer that sees one piece of each caption only.

    Args:
        tokenizer: the whole captions'.
        number: of the piece, from 0.
    """

    def __init__(self, tokenizer: Any, number: int):
        self._tokenizer, self._number = tokenizer, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, captions: str | Sequence[str], **options: Any) -> Any:
        """Ids [B L] of the pieces as the tokenizer would give them of a text; pieces beyond a caption's end are empty."""
        room = self._tokenizer.model_max_length - SPECIAL
        said = [captions] if isinstance(captions, str) else list(captions)
        first = self._number * room
        ids = [tokens(self._tokenizer, one)[first : first + room] for one in said]
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        whole = {"input_ids": [[start, *own, end] for own in ids]}
        fixed = options.get("padding") == "max_length"
        padding = {"padding": "max_length", "max_length": room + SPECIAL} if fixed else {"padding": True}
        return self._tokenizer.pad(whole, return_tensors=options.get("return_tensors"), **padding)


def tokens(tokenizer: Any, caption: str) -> list[int]:
    """All of a caption's tokens, without start and end."""
    ids: list[int] = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return ids


def pieces(tokenizers: Iterable[Any], captions: Iterable[str]) -> int:
    """Pieces that the longest of some captions has; at least 1."""
    said, most = list(captions), 1
    for tokenizer in tokenizers:
        room = tokenizer.model_max_length - SPECIAL
        most = max([most, *(-(-len(tokens(tokenizer, one)) // room) for one in said)])
    return most


def join(texts: Sequence[Text]) -> Text:
    """The pieces of some captions as one text: states one after the other, the rest from the first."""
    made = Text(texts[0])
    made[STATES] = torch.cat([text[STATES] for text in texts], 1)
    return made


def cut(part: str, tokenizer: Any, limit: int, special: int, captions: Iterable[str]) -> str | None:
    """What a text encoder does not read of some captions; None if it reads all.

    Args:
        limit: tokens it takes, those special ones included that it puts around a caption.
    """
    lengths = {caption: len(tokens(tokenizer, caption)) + special for caption in captions}
    over = {caption: length - limit for caption, length in lengths.items() if length > limit}
    if not over:
        return None
    longest = max(over, key=lambda caption: over[caption])
    shown = longest if len(longest) <= 60 else longest[:57] + "…"
    return (
        f"{len(over)} of {len(lengths)} captions are longer than the {limit} tokens that {part} takes: {sum(over.values())} "
        f"tokens are not read; the longest has {lengths[longest]}: {shown!r}"
    )
