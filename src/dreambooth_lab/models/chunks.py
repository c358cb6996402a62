"""Captions longer than a text encoder's limit: counted, or read in chunks of 75 tokens by CLIP encoders, as in other trainers.

Each chunk has its own start and end tokens. The chunks' states are concatenated, and the pooled output is the first chunk's. A
caption of one chunk is read as usual.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..batch import Text

SPECIAL = 2  # CLIP's start and end tokens
STATES = "prompt_embeds"  # the tensor with a state for each token


class Piece:
    """A CLIP tokenizer that returns only one chunk of each caption.

    Args:
        tokenizer: for whole captions.
        number: index of the chunk, from 0.
    """

    def __init__(self, tokenizer: Any, number: int):
        self._tokenizer, self._number = tokenizer, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, captions: str | Sequence[str], **options: Any) -> Any:
        """Ids [B L] of the chunks, in the tokenizer's format; chunks beyond a caption's end are empty."""
        room = self._tokenizer.model_max_length - SPECIAL
        lines = [captions] if isinstance(captions, str) else list(captions)
        first = self._number * room
        ids = [tokens(self._tokenizer, one)[first : first + room] for one in lines]
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        whole = {"input_ids": [[start, *own, end] for own in ids]}
        fixed = options.get("padding") == "max_length"
        padding = {"padding": "max_length", "max_length": room + SPECIAL} if fixed else {"padding": True}
        return self._tokenizer.pad(whole, return_tensors=options.get("return_tensors"), **padding)


def tokens(tokenizer: Any, caption: str) -> list[int]:
    """All tokens of a caption, without start and end."""
    ids: list[int] = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return ids


def pieces(tokenizers: Iterable[Any], captions: Iterable[str]) -> int:
    """Number of chunks of the longest caption; at least 1."""
    lines, most = list(captions), 1
    for tokenizer in tokenizers:
        room = tokenizer.model_max_length - SPECIAL
        most = max([most, *(-(-len(tokens(tokenizer, one)) // room) for one in lines)])
    return most


def join(texts: Sequence[Text]) -> Text:
    """Concatenate the chunks of some captions: states one after the other, the other tensors from the first chunk."""
    made = Text(texts[0])
    made[STATES] = torch.cat([text[STATES] for text in texts], 1)
    return made


def cut(part: str, tokenizer: Any, limit: int, special: int, captions: Iterable[str]) -> str | None:
    """A notice on captions that a text encoder truncates; None if there are none.

    Args:
        limit: maximum number of tokens, including special tokens.
    """
    lengths = {caption: len(tokens(tokenizer, caption)) + special for caption in captions}
    over = {caption: length - limit for caption, length in lengths.items() if length > limit}
    if not over:
        return None
    longest = max(over, key=lambda caption: over[caption])
    shown = longest if len(longest) <= 60 else longest[:57] + "…"
    return (
        f"{len(over)} of {len(lengths)} captions are longer than the limit of {part}, {limit} tokens: {sum(over.values())} "
        f"tokens are ignored; the longest has {lengths[longest]}: {shown!r}"
    )
