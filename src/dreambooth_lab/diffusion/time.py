"""Where t is drawn: maps from u ~ U[0,1) to t in [0, 1)."""

from __future__ import annotations

from torch import Tensor


def uniform(u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """t ~ U[low, high), the part of the path a model was trained on [B]."""
    return low + (high - low) * u
