"""How data becomes noise, and what the network predicts.

One convention everywhere: t in [0, 1], 0 is data and 1 is noise, x_t = α_t x_0 + σ_t ε. A time below 0 means "all the way
to data" (α = 1, σ = 0), where sampling ends. The network's own clock appears in `native` only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

import torch
from torch import Tensor


class Prediction(Enum):
    epsilon = "epsilon"
    v_prediction = "v_prediction"


class Path(ABC):
    """The noising path of a model family. Times are [B]; samples [B C h w]."""

    @abstractmethod
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t, each [B 1 1 1]."""

    @abstractmethod
    def native(self, t: Tensor) -> Tensor:
        """t on the network's own clock [B]."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should answer at x_t."""

    @abstractmethod
    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The (x_0, ε) that an answer at x_t implies."""

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = α_t x_0 + σ_t ε."""
        alpha, sigma = self.scales(t)
        return alpha * x0 + sigma * eps

    def step(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The deterministic first-order step from t to s ≤ t, per row: DDIM (Song et al. 2021, eq. 12 with η = 0), which
        is Euler's step of the probability-flow ODE in σ/α, and for flows Euler's step in t."""
        return self.noise(*self.split(output, x_t, t), s)


class VariancePreserving(Path):
    """α² + σ² = 1 on N discrete steps (Ho et al. 2020); t names step ⌊t N⌋, so t ~ U[0,1) draws steps uniformly.

    Args:
        alphas_cumprod: ᾱ [N], decreasing, in (0, 1).
        prediction: ε, or v = α ε - σ x_0 (Salimans & Ho 2022).
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction):
        self.alphas_cumprod = torch.cat([alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])  # [-1]: data
        self.prediction = prediction

    @property
    def num_steps(self) -> int:
        return len(self.alphas_cumprod) - 1

    def native(self, t: Tensor) -> Tensor:
        return (t.double() * self.num_steps).floor().long().clamp(-1, self.num_steps - 1)

    def time(self, native: Tensor) -> Tensor:
        """The t in the middle of a native step; the inverse of `native`."""
        return (native.double() + 0.5) / self.num_steps

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        self.alphas_cumprod = self.alphas_cumprod.to(t.device)
        alpha_bar = self.alphas_cumprod[self.native(t)].view(-1, 1, 1, 1)
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.prediction is Prediction.epsilon:
            return eps
        alpha, sigma = self.scales(t)
        return alpha * eps - sigma * x0

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t)
        if self.prediction is Prediction.epsilon:
            return (x_t - sigma * output) / alpha, output
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output


class RectifiedFlow(Path):
    """x_t = (1-t) x_0 + t ε; the network answers the velocity ε - x_0 (Liu et al. 2023; Esser et al. 2024).

    Args:
        num_steps: N of the network's clock, which reads t N.
    """

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def native(self, t: Tensor) -> Tensor:
        return t * self.num_steps

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.clamp(min=0).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t)
        return x_t - sigma * output, x_t + alpha * output
