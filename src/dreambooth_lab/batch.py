"""The records that travel from the data to the loss. Immutable, typed, shapes said once.

Letters: B rows, C latent channels, h w latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Record(dict[str, Tensor]):
    """Named tensors, a row for each sample first. Only the model family knows the names; everybody else moves whole rows."""

    @property
    def rows(self) -> int:
        return len(next(iter(self.values())))

    def take(self, rows: Tensor) -> Self:
        """Some of the rows."""
        return type(self)({name: tensor[rows] for name, tensor in self.items()})

    def put(self, rows: Tensor, other: Record) -> Self:
        """With other tensors at some rows, for the names that `other` has; the rest stays."""
        made = type(self)(self)
        for name, tensor in other.items():
            own, tensor = _same_shape([self[name], tensor.to(self[name])])
            made[name] = own.index_copy(0, rows, tensor)
        return made

    def to(self, device: torch.device) -> Self:
        return type(self)({name: tensor.to(device) for name, tensor in self.items()})

    def repeat(self, n: int) -> Self:
        """A single row n times."""
        return type(self)({name: tensor.expand(n, *tensor.shape[1:]) for name, tensor in self.items()})

    @classmethod
    def stack(cls, records: Sequence[Self]) -> Self:
        """All rows of all records. Tensors of different length are padded with zeros at their ends; a family whose captions
        differ in length has a mask or a length among its tensors, so that padding is never read."""
        return cls({name: torch.cat(_same_shape([record[name] for record in records])) for name in records[0]})


class Text(Record):
    """What the text encoders say about captions."""


class Cond(Record):
    """Everything the denoiser is told besides x_t and t."""


class Size(NamedTuple):
    """A picture's own size, where its crop began after resizing, and the size trained on (SDXL §2.2), in pixels."""

    original: tuple[int, int]  # height, width
    crop: tuple[int, int]  # top, left
    target: tuple[int, int]  # height, width


class Shown(NamedTuple):
    """A picture as the denoiser may be told of it."""

    size: Size
    latents: Tensor  # [C h w], the mean of its posterior
    seed: int
    index: int  # type: ignore[assignment]  # (over tuple's) with the seed, what further draws of this row are keyed by
    aesthetic_score: float  # that the row is trained under, for models that are told one (SDXL's refiner)


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


def _same_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [B_i …] padded with zeros at the end of each dimension but the first, until all agree."""
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return list(tensors)
    whole = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    made = []
    for tensor in tensors:
        padding = [(0, most - size) for most, size in zip(whole, tensor.shape[1:], strict=True)]
        made.append(F.pad(tensor, [side for pair in reversed(padding) for side in pair]))
    return made
