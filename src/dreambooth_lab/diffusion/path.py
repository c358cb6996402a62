"""How data becomes noise, and what the network predicts.

One convention everywhere: t in [0, 1], 0 is data and 1 is noise, x_t = α_t x_0 + σ_t ε. A time below 0 means data
(α = 1, σ = 0), where sampling ends. The network's own timesteps appear only in `native`. float64 is replaced by
float32 on devices without float64 (`batch.widest`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..batch import to_device, widest
from ..config import enums


class Path(ABC):
    """The noising path of a model family. Times are [B]; samples [B C h w]."""

    straight: bool  # x_t moves at the constant velocity ε - x_0
    num_steps: int  # N, the number of the network's timesteps
    prediction: enums.Prediction | None = None  # what the network predicts, if there is a choice
    top: float = 1.0  # the noisiest time at which a sample still contains information about its image

    @abstractmethod
    def exact_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t in float64 [B]."""

    @abstractmethod
    def gain(self, t: Tensor) -> Tensor:
        """Factor from a squared error of the prediction to the squared error of the ε it implies [B], float64."""

    @abstractmethod
    def native(self, t: Tensor) -> Tensor:
        """t as the network's own timestep [B]."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The training target at x_t."""

    @abstractmethod
    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The (x_0, ε) implied by a prediction at x_t."""

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t for broadcasting over samples: float32 [B 1 1 1]."""
        alpha, sigma = self.exact_scales(t)
        return alpha.float().view(-1, 1, 1, 1), sigma.float().view(-1, 1, 1, 1)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio α² / σ² in float64 [B]."""
        alpha, sigma = self.exact_scales(t)
        return (alpha / sigma).square()

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = α_t x_0 + σ_t ε."""
        alpha, sigma = self.scales(t)
        return alpha * x0 + sigma * eps

    def implied_noise(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The ε that separates x_t from x_0: (x_t - α_t x_0) / σ_t."""
        alpha, sigma = self.scales(t)
        return (x_t - alpha * x0) / sigma

    def step(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The deterministic first-order step from t to s ≤ t, per row: DDIM (Song et al. 2021, eq. 12 with η = 0), which
        is Euler's step of the probability-flow ODE in σ/α, and for flows Euler's step in t."""
        return self.noise(*self.split(output, x_t, t), s)


class VariancePreserving(Path):
    """α² + σ² = 1 on N discrete steps (Ho et al. 2020); t names step ⌊t N⌋, so t ~ U[0,1) draws steps uniformly.

    Args:
        alphas_cumprod: ᾱ [N], decreasing, in [0, 1).
        prediction: ε, or v = α ε - σ x_0 (Salimans & Ho 2022).
    """

    straight = False

    def __init__(self, alphas_cumprod: Tensor, prediction: enums.Prediction):
        self.alphas_cumprod = torch.cat([alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])  # [-1]: data; on the host
        self.copies: dict[torch.device, Tensor] = {}  # on other devices
        self.prediction = prediction
        self.num_steps = len(alphas_cumprod)
        if float(alphas_cumprod[-1]) == 0:  # zero terminal SNR (Lin et al. 2024)
            self.top = (self.num_steps - 1.5) / self.num_steps

    def native(self, t: Tensor) -> Tensor:
        return (_exact(t) * self.num_steps).floor().long().clamp(-1, self.num_steps - 1)

    def time(self, native: Tensor) -> Tensor:
        """The t in the middle of a native step; the inverse of `native`."""
        return (_exact(native) + 0.5) / self.num_steps

    def exact_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.device not in self.copies:
            self.copies[t.device] = to_device(self.alphas_cumprod, t.device)
        alpha_bar = self.copies[t.device][self.native(t)]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def gain(self, t: Tensor) -> Tensor:
        return (
            torch.ones_like(t, dtype=widest(t.device))
            if self.prediction is enums.Prediction.epsilon
            else self.exact_scales(t)[0].square()
        )

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.prediction is enums.Prediction.epsilon:
            return eps
        alpha, sigma = self.scales(t)
        return alpha * eps - sigma * x0

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t)
        if self.prediction is enums.Prediction.epsilon:
            return (x_t - sigma * output) / alpha, output
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output


class RectifiedFlow(Path):
    """x_t = (1-t) x_0 + t ε; the network predicts the velocity ε - x_0 (Liu et al. 2023; Esser et al. 2024).

    Args:
        num_steps: N; the network's timestep is t N.
    """

    straight = True

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def native(self, t: Tensor) -> Tensor:
        return t * self.num_steps

    def exact_scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = _exact(t).clamp(min=0)
        return 1 - sigma, sigma

    def gain(self, t: Tensor) -> Tensor:
        return (1 - _exact(t)).square()

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t)
        return x_t - sigma * output, x_t + alpha * output


def _exact(t: Tensor) -> Tensor:
    """Cast to the most precise dtype of its device."""
    return t.to(widest(t.device))
