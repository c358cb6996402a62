"""Draws t: u ~ U[0,1) → t in [low, high), by the inverse distribution function, so that the same u works for all
distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor

from ..config import ConfigError, enums

Shift = Callable[[int, int], float]  # height and width of a latent, cells → the time shift of its size


def shift(t: Tensor, s: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): s > 1 moves times towards noise (Esser et al. 2024, eq. 23); 1/s undoes it."""
    return s * t / (1 + (s - 1) * t)


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """t = sigmoid(m + s z) with z ~ N(0,1) made from u (Esser et al. 2024, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def logit_normal_cdf(t: Tensor, mean: float, std: float) -> Tensor:
    """The inverse of `logit_normal`: t → u."""
    return torch.special.ndtr((torch.logit(t) - mean) / std)


class Times:
    """The distribution of training times: uniform or logit-normal, then shifted, then limited to a range (the distribution
    given that t lies in it, not a clamp).

    Args:
        mean, std: of the logit-normal.
        shift: of a latent's size; 1 for none.
        low, high: the range, inside [0, 1].
    """

    def __init__(self, kind: enums.Timesteps, mean: float, std: float, shift: Shift, low: float, high: float):
        self.kind, self.mean, self.std, self.shift, self.range = kind, mean, std, shift, (low, high)

    def __call__(self, u: Tensor, size: Sequence[int]) -> Tensor:
        """U[0,1) [B] → times [B], float64.

        Args:
            size: height and width of the rows' latents, cells.
        """
        s = self.shift(*size)
        first, last = self._shares_below(torch.tensor(self.range, dtype=torch.float64), s).tolist()
        u = first + (last - first) * u.double()
        base = logit_normal(u, self.mean, self.std) if self.kind is enums.Timesteps.logit_normal else u
        return shift(base, s)

    def describe(self, size: Sequence[int]) -> str:
        """Everything that times of a size depend on besides u."""
        return repr((self.kind.name, self.mean, self.std, self.shift(*size), self.range))

    def _shares_below(self, t: Tensor, s: float) -> Tensor:
        base = shift(t, 1 / s).clamp(0, 1)  # rounding may leave the interval
        return logit_normal_cdf(base, self.mean, self.std) if self.kind is enums.Timesteps.logit_normal else base


def build_shift(value: float | str, model: Shift) -> Shift:
    """The shift of a key: a number, or `model`, the model's own for a latent's size."""
    return model if value == "model" else lambda height, width: float(value)


def build_times(cfg: DictConfig, trained: tuple[float, float], model: Shift) -> Times:
    """The times of the `objective` group, inside the model's training range.

    Args:
        model: the model's own shift.

    Raises:
        ConfigError: the two ranges do not overlap.
    """
    low, high = max(cfg.min_time, trained[0]), min(cfg.max_time, trained[1])
    if low >= high:
        raise ConfigError(
            f"objective.min_time={cfg.min_time:g} and objective.max_time={cfg.max_time:g} exclude all of "
            "this model's training range, "
            f"{trained[0]:g} to {trained[1]:g}; choose a range inside"
        )
    return Times(cfg.timesteps, cfg.logit_mean, cfg.logit_std, build_shift(cfg.shift, model), low, high)
