"""Averages of weights whose length is chosen after training (post-hoc EMA: Karras et al. 2024, EDM2, §3.1 and appendix C).

A power-function average follows θ̂_γ(t) = β_γ(t) θ̂_γ(t-1) + (1 - β_γ(t)) θ(t), β_γ(t) = (1 - 1/t)^(γ+1): weight θ(τ) has the
share p_{t,γ}(τ) = (γ + 1) τ^γ / t^(γ+1). Its length is the relative standard deviation of that share, σ_rel: .1 averages over
about a tenth of the training. From snapshots of a few such averages, that of any other length is the linear combination whose
share is nearest to the wanted one in the least-squares sense.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LONGEST = 0.28  # σ_rel at γ = 0, the plain mean, is 12^-½


class Share(NamedTuple):
    """The average with exponent γ after t steps."""

    t: float
    gamma: float


def gamma_of(length: float) -> float:
    """γ of an average of length σ_rel in (0, 0.28]: σ_rel² = (γ + 1) (γ + 2)^-2 (γ + 3)^-1."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def beta(step: int, gamma: float, interval: int = 1) -> float:
    """Factor of the average at `step`, updated every `interval` steps."""
    return float(max(0, 1 - interval / step) ** (gamma + 1))


def coefficients(snapshots: Sequence[Share], wanted: Share) -> list[float]:
    """The factors x_i, with sum 1, with which ∑ x_i p_i is nearest to the wanted share; they need not be positive.

    EDM2 leaves the sum free. With sum 1, weights that never change are reproduced exactly. `wanted` must not end after the last
    snapshot.
    """
    n = len(snapshots)
    system, right = np.ones((n + 1, n + 1)), np.ones(n + 1)  # the last row and column: Lagrange's, for the sum
    system[:n, :n] = [[product(a, b) for b in snapshots] for a in snapshots]
    system[n, n], right[:n] = 0, [product(a, wanted) for a in snapshots]
    return [float(x) for x in np.linalg.lstsq(system, right, rcond=1e-14)[0][:n]]


def product(a: Share, b: Share) -> float:
    """∫ p_a(τ) p_b(τ) dτ."""
    first, last = (a, b) if a.t < b.t else (b, a)
    scale = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1)
    return float(scale * (first.t / last.t) ** last.gamma / last.t)
