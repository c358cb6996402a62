"""The loss weight of each noise level, learned as the model's uncertainty there (Karras et al. 2024, EDM2, §3.3)."""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor, nn

FEATURES = 128  # as in the paper
FURTHEST = 10.0  # |ln(σ/α)| is at most this, since it is infinite at pure noise and at data
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly


class Uncertainty(nn.Module):
    """Each row's loss L becomes L / e^u + u, with u a function of the noise level.

    Its minimum over u is at u = ln E[L], so the expected weighted loss, and with it the size of the gradient, is the same at
    every noise level. u is linear in Fourier features of ln(σ/α) / 4 and starts at 0, the plain loss. It is trained with the
    adapter, saved in checkpoints, and never exported. Frequencies and phases are fixed, evenly spread quantiles of the paper's
    distributions, 2π N(0,1) and 2π U[0,1).
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        place = torch.arange(FEATURES, dtype=torch.float64)
        frequencies, phases = torch.special.ndtri((place + 0.5) / FEATURES), place * GOLDEN % 1
        self.register_buffer("frequencies", (2 * pi * frequencies).float(), persistent=False)
        self.register_buffer("phases", (2 * pi * phases).float(), persistent=False)
        self.weight, self.bias = nn.Parameter(torch.zeros(FEATURES)), nn.Parameter(torch.zeros(1))

    def log_loss(self, snr: Tensor) -> Tensor:
        """u, the learned ln E[L], at signal-to-noise ratios [B]; float32."""
        noise = (-0.5 * snr.log()).clamp(-FURTHEST, FURTHEST).float() / 4  # ln(σ/α) / 4
        features = sqrt(2 / FEATURES) * torch.cos(noise[:, None] * self.frequencies + self.phases)  # [B F], norm about 1
        return features @ self.weight + self.bias

    def forward(self, error: Tensor, snr: Tensor, instance_rows: Tensor) -> Tensor:
        """Weighted errors [B].

        Class rows have the instance rows' weight at their noise level, so that λ means the same at each, but no part in learning
        u: a fresh adapter's distance from its teacher is 0, whose logarithm is no use.

        Args:
            error: [B], at least 0.
            snr: [B].
            instance_rows: positions in [0, B).
        """
        u = self.log_loss(snr)
        own = torch.zeros_like(u).index_fill(0, instance_rows, 1.0)
        learning = torch.lerp(u.detach(), u, own)  # in the graph in any case: DDP waits for the gradient of every parameter
        return error * torch.exp(-learning) + own * u
