"""The trainable embedding of the rare token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import words

Slot = tuple[nn.Embedding, int]  # a text encoder's input embedding, and the token's row in it


class TokenEmbedding(nn.Module):
    """Stands in for one token's row in every text encoder; textual inversion's variable (Gal et al. 2023), initialised with
    the model's own embedding. The encoders and the embeddings of all other words stay unchanged.

    Args:
        word: the token, as written in prompts.
        slots: its position in each text encoder.
    """

    def __init__(self, word: str, slots: Sequence[Slot]):
        super().__init__()
        self.word = word
        self.rows = nn.ParameterList(nn.Parameter(layer.weight[row].detach().float().clone()) for layer, row in slots)
        for (layer, row), learned in zip(slots, self.rows, strict=True):
            layer.register_forward_hook(_put(row, learned))

    def occurs_in(self, caption: str) -> bool:
        return self.word.lower() in words(caption)


def _put(row: int, learned: Tensor) -> Any:
    def hook(layer: nn.Module, ids: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.where((ids[0] == row)[..., None], learned.to(output.dtype), output)

    return hook
