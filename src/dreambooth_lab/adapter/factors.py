"""Low-rank updates alpha / rank · B A as factors: norms, truncations and sums without the full matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ConfigError


class Factors(NamedTuple):
    """The update of one layer."""

    down: Tensor  # A  [r in], of a convolution [r in k k]
    up: Tensor  # B    [out r], of a convolution [out r 1 1]
    alpha: float  # the update is alpha / r · B A

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


Parts = Mapping[str, Mapping[str, Factors]]  # part of a pipeline → layer → its update


def flat(layer: Factors) -> tuple[Tensor, Tensor]:
    """A [r, in·k·k] and alpha / r · B [out, r], float64."""
    return layer.down.flatten(1).double(), layer.up.flatten(1).double() * layer.scale


def folded(layer: Factors) -> Factors:
    """The same update with alpha = r, the default of readers that find no alpha; float32 if the scale isn't 1."""
    if layer.scale == 1:
        return layer
    return Factors(layer.down, (layer.up.double() * layer.scale).float(), float(layer.rank))


def squared_norm(layer: Factors) -> float:
    """‖s B A‖² = tr(sBᵀsB · AAᵀ), by the r × r Gram matrices."""
    a, b = flat(layer)
    return max(((b.T @ b) * (a @ a.T)).sum().item(), 0.0)


def squared_distance(one: Factors, other: Factors) -> float:
    """‖ΔW − ΔW'‖² of two updates of one layer, as the norm of one of rank r + r'."""
    (a, b), (c, d) = flat(one), flat(other)
    both = torch.cat([a, c])
    return squared_norm(Factors(both, torch.cat([b, -d], 1), float(len(both))))


def decomposed(layer: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The update's singular value decomposition U [out, r], S [r], Vᵀ [r, in·k·k], through QR of the factors; float64."""
    a, b = flat(layer)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, v @ q_a.T


def cut(layer: Factors, rank: int | None = None, keep: float | None = None) -> tuple[Factors, float]:
    """The nearest update of a lower rank (Eckart and Young 1936), and the squared distance by the singular values.

    Args:
        rank: at most this.
        keep: instead: the lowest rank with at least this share of the squared norm, in (0, 1].
    """
    u, s, v = decomposed(layer)
    squares = s.square()
    if keep is not None:
        enough = squares.cumsum(0) >= keep * squares.sum() * (1 - 1e-12)
        rank = int(enough.int().argmax()) + 1
    rank = min(rank or layer.rank, len(s))
    root = s[:rank].sqrt()
    down = (root[:, None] * v[:rank]).to(layer.down.dtype).reshape(rank, *layer.down.shape[1:])
    up = (u[:, :rank] * root).to(layer.up.dtype).reshape(len(u), rank, *layer.up.shape[2:])
    return Factors(down.contiguous(), up.contiguous(), float(rank)), squares[rank:].sum().item()


def merged(files: Sequence[Parts], weights: Sequence[float]) -> dict[str, dict[str, Factors]]:
    """Σ weight · update, exactly: concatenated factors, so the ranks add up.

    Raises:
        ConfigError: a layer has different sizes in two files.
    """
    found: dict[str, dict[str, Factors]] = {}
    for parts, weight in zip(files, weights, strict=True):
        for part, layers in parts.items():
            into = found.setdefault(part, {})
            for name, layer in layers.items():
                one = folded(layer._replace(alpha=layer.alpha * weight))
                into[name] = _beside(into[name], one, f"{part}.{name}") if name in into else one
    return found


def _beside(one: Factors, other: Factors, name: str) -> Factors:
    sizes = [(layer.up.shape[0], *layer.down.shape[1:]) for layer in (one, other)]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"{name} is {sizes[0]} in one file and {sizes[1]} in another; merge LoRAs of one base model")
    dtype = torch.promote_types(one.down.dtype, other.down.dtype), torch.promote_types(one.up.dtype, other.up.dtype)
    down = torch.cat([one.down.to(dtype[0]), other.down.to(dtype[0])])
    return Factors(down, torch.cat([one.up.to(dtype[1]), other.up.to(dtype[1])], 1), float(len(down)))
