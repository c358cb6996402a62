"""The records that travel from the data to the loss. Immutable, typed, shapes said once.

Letters: B rows, C latent channels, h w latent grid, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """What the text encoders say about captions."""

    states: Tensor  # [B L D]
    pooled: Tensor  # [B P]


class Size(NamedTuple):
    """A picture's own size, where its crop began after resizing, and the size trained on (SDXL §2.2), in pixels."""

    original: tuple[int, int]  # height, width
    crop: tuple[int, int]  # top, left
    target: tuple[int, int]  # height, width


class Cond(NamedTuple):
    """Everything the denoiser is told besides x_t and t."""

    states: Tensor  # [B L D]
    pooled: Tensor  # [B P]
    size: Tensor  # [B 6] original h w, crop top left, target h w

    def take(self, rows: Tensor) -> Cond:
        return Cond(*(part[rows] for part in self))

    def put(self, rows: Tensor, text: Text) -> Cond:
        """With other text at some rows."""
        states = self.states.index_copy(0, rows, text.states.to(self.states.dtype))
        return self._replace(states=states, pooled=self.pooled.index_copy(0, rows, text.pooled.to(self.pooled.dtype)))


class Kinds(NamedTuple):
    """Rows of each kind in a micro-batch, the mean over all micro-batches and ranks of its optimiser step: means over a step's
    rows come out the same however it is cut up."""

    instances: float
    classes: float


class Batch(NamedTuple):
    """Rows of one shape, with every random choice already drawn."""

    sample: Tensor  # [B] global sample index n
    mean: Tensor  # [B C h w] VAE posterior, in the denoiser's latent scale
    std: Tensor  # [B C h w]
    z: Tensor  # [B C h w] N(0,1): the posterior's noise
    eps: Tensor  # [B C h w] N(0,1): ε
    u: Tensor  # [B] U[0,1): becomes t
    walk: Tensor  # [B 2] U[0,1): whether a row rolls out, and how far
    xi: Tensor | None  # [B C h w] N(0,1): input perturbation, if it is on
    cond: Cond
    captions: tuple[str, ...]  # B of them, as drawn
    instance_rows: Tensor  # [≤B] positions of the subject's rows
    class_rows: Tensor  # [≤B] positions of the class rows
    kinds: Kinds
    mask: Tensor | None  # [B 1 h w] in [0,1], or no masks at all
    taught: Tensor | None  # [class rows, C h w], the base model's answers from the bank, if there is one

    def latents(self) -> Tensor:
        """x_0 drawn from the cached posterior [B C h w]."""
        return self.mean + self.std * self.z


def stack_text(texts: list[Text]) -> Text:
    """Rows of one caption each ([1 L D], [1 P]) as one record."""
    return Text(torch.cat([t.states for t in texts]), torch.cat([t.pooled for t in texts]))
