"""The terms of the objective, each a small function with its equation."""

from __future__ import annotations

from torch import Tensor


def masked_error(output: Tensor, target: Tensor, mask: Tensor | None, normalize: bool, floor: float) -> Tensor:
    """Squared error per row, weighted over the latent grid [B].

    With weights w = floor + (1 - floor)·mask: mean(w (output - target)²), divided by mean(w) when `normalize`, so that a
    small subject weighs as much as a large one. Without masks, and with a mask of ones, it is the plain mean.

    Args:
        output, target: [B C h w].
        mask: [B 1 h w] in [0, 1], or None.
        floor: least weight outside the mask, in [0, 1].
    """
    error = (output.float() - target.float()).square()
    if mask is None:
        return error.mean((1, 2, 3))
    weight = floor + (1 - floor) * mask  # [B 1 h w]
    area = weight.mean((1, 2, 3)) if normalize else 1.0
    return (error * weight).mean((1, 2, 3)) / area


def preserve_prior(error: Tensor, instance_rows: Tensor, class_rows: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over instance rows + λ · mean over class rows (Ruiz et al. 2023, eq. 2): total, instance term, class term.

    A term without rows is 0. Means are taken over each kind's own rows, so neither depends on the other's number.

    Args:
        error: one weighted error per row [B].
        instance_rows, class_rows: positions in [0, B).
        weight: λ.
    """
    instance = error[instance_rows].sum() / max(len(instance_rows), 1)
    prior = error[class_rows].sum() / max(len(class_rows), 1)
    return instance + weight * prior, instance, prior
