"""The terms of the loss, each a small function with its equation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import RowCounts
from .config import ConfigError, enums
from .diffusion.path import Path

Penalty = Callable[[Tensor], Tensor]  # difference → error, elementwise


def squared(difference: Tensor) -> Tensor:
    """d²."""
    return difference.square()


def pseudo_huber(difference: Tensor, c: Tensor) -> Tensor:
    """2c (√(d² + c²) - c): d² near 0, 2c |d| far from 0, so outliers have less weight (Song & Dhariwal 2023, §3.3).

    Args:
        c: width of the quadratic part, [B 1 1 1].
    """
    return 2 * c * (torch.sqrt(difference.square() + c.square()) - c)


def huber_width(schedule: enums.HuberSchedule, c: float, snr: Tensor) -> Tensor:
    """c per row [B 1 1 1]: constant, or c + (1 - c) / (1 + σ/α)², wide at data and narrow at noise (Khrapov et al. 2024)."""
    constant = torch.full_like(snr, c)
    width = constant if schedule is enums.HuberSchedule.constant else c + (1 - c) / (1 + snr.rsqrt()).square()
    return width.float().view(-1, 1, 1, 1)


def masked_error(
    output: Tensor, target: Tensor, mask: Tensor | None, normalize: bool, floor: float, penalty: Penalty = squared
) -> Tensor:
    """Error of each row [B], weighted over the latent grid.

    With weights w = floor + (1 - floor)·mask: mean(w · penalty(output - target)), divided by mean(w) when `normalize`, so that
    a small subject weighs as much as a large one. Without masks, or with a mask of ones, it is the plain mean. A mask of zeros
    without floor gives 0.

    Args:
        output, target: [B C h w].
        mask: [B 1 h w] in [0, 1], or None.
        floor: minimum weight outside the mask, in [0, 1].
    """
    error = penalty(output.float() - target.float())
    if mask is None:
        return error.mean((1, 2, 3))
    weight = floor + (1 - floor) * mask  # [B 1 h w]
    area = weight.mean((1, 2, 3)).clamp(min=torch.finfo(weight.dtype).tiny) if normalize else 1.0
    return (error * weight).mean((1, 2, 3)) / area


def outside_error(output: Tensor, teacher_output: Tensor, mask: Tensor, floor: float, penalty: Penalty = squared) -> Tensor:
    """The error outside the mask against the base model's prediction: mean((1 - w) · penalty(output - taught)) [B]."""
    weight = (1 - floor) * (1 - mask)  # [B 1 h w]
    return (penalty(output.float() - teacher_output.float()) * weight).mean((1, 2, 3))


def consistency(error: Tensor, base_error: Tensor, beta: float) -> Tensor:
    """(2 / β) · -log σ(-β (e - e_base)) of each row [B]: Direct Consistency Optimization (Lee et al. 2024).

    e and e_base are the errors of the model and of the base model at the same (x_t, t, ε), as means over the elements, times the
    weight of their time; β stands for the paper's β T. The factor 2 / β is ours: with it the gradient of a model that is the base
    is that of the plain loss, whatever β, as it is in the limit of β = 0. A row's gradient is 2 σ(β (e - e_base)) ∇e: it fades
    once the model beats the base there, and at most doubles where it is worse. (The authors' script compares means over a batch.)
    """
    return (2 / beta) * F.softplus(beta * (error - base_error))


def preserve_prior(error: Tensor, instance_rows: Tensor, class_rows: Tensor, row_counts: RowCounts, weight: float) -> Tensor:
    """(Sum over instance rows) / n + λ · (sum over class rows) / m; n and m are the rows of each to be *expected* in a batch.

    Its expected gradient is that of the mean over instance rows + λ · the mean over class rows (Ruiz et al. 2023, eq. 2), at any
    batch size and class share. Dividing by a batch's actual rows would be wrong: at batch size 1 and a share of
    .1, nine of ten batches have no class row, and λ would act as .11 λ. n and m grow with the batch size, so the mean over
    micro-batches and ranks does not depend on how a step is divided. A term without rows is 0.

    Args:
        error: one weighted error per row [B].
        instance_rows, class_rows: positions in [0, B).
        kinds: n and m.
        weight: λ.
    """
    instance = error[instance_rows].sum() / (row_counts.instances or 1)
    return instance + weight * error[class_rows].sum() / (row_counts.classes or 1)


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """min(1, γ / SNR), which is min(SNR, γ) on the error of x_0 (Hang et al. 2023, eq. 8)."""
    return (gamma / snr).clamp(max=1)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """γ / (SNR + γ): a smooth min-SNR (Crowson et al. 2024, eq. 16)."""
    return gamma / (snr + gamma)


def debiased(snr: Tensor, gamma: float) -> Tensor:
    """1 / √SNR (Yu et al. 2023); γ is not used."""
    return snr.rsqrt()


ON_NOISE = {enums.Weight.min_snr: min_snr, enums.Weight.soft_min_snr: soft_min_snr, enums.Weight.debiased: debiased}


def time_weight(kind: enums.Weight, gamma: float, path: Path, t: Tensor) -> Tensor:
    """Weight of each row's error [B], float32.

    w(SNR) is the weight of the error of ε, which stays finite at pure noise. The network's own error differs from it by the
    factor `path.gain`, so its weight is w · gain. For min-SNR that is min(1, γ / SNR) on ε, min(SNR, γ) / (SNR + 1) on v, and
    min(SNR, γ) t² on a velocity.
    """
    if kind not in ON_NOISE:  # none, or learned, which weights by itself
        return torch.ones_like(t, dtype=torch.float32)
    return (ON_NOISE[kind](path.snr(t), gamma) * path.gain(t)).float()


def require_finite(kind: enums.Weight, path: Path) -> None:
    """Check that the loss weight is finite everywhere on the path.

    Raises:
        ConfigError: debiased, on a path that ends in pure noise.
    """
    if kind is enums.Weight.debiased and path.top < 1:
        raise ConfigError(
            "objective.weight is debiased, which is infinite at pure noise, and this model's schedule has zero terminal SNR; "
            "use min_snr, soft_min_snr or none"
        )
