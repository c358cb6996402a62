"""Solvers of the sampling ODE, with separate times for each row.

A solver moves a batch from times t to times s ≤ t, step by step, and stores what it needs from previous steps. A row
with s = t is not changed, so rows with different numbers of steps can share one batch; all start together.
Times are [B] as in `path`, samples [B C h w]. Coefficients are float64, because steps of 1/1000 cancel badly in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import enums
from .path import Path


class Solver(ABC):
    """State of one trajectory; build a new solver for the next. Two times on one discrete step are the same point."""

    def __init__(self, path: Path):
        self.path = path

    def step(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s from the network's prediction at x_t."""
        return torch.where((s < t).view(-1, 1, 1, 1), self._step(output, x_t, t, s), x_t)

    @abstractmethod
    def _step(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor: ...


class Euler(Solver):
    """Euler's method in σ/α, for flows in t; the same as DDIM."""

    def _step(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.path.step(output, x_t, t, s)


class Point(NamedTuple):
    """A point of the trajectory."""

    t: Tensor  # [B]
    x: Tensor  # [B C h w], the start of the step from here
    data: Tensor  # [B C h w], the x_0 predicted here


class Dpm(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2): second order from the second step on, first order at the last."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.past: list[Point] = []  # newest last, at most two

    def _step(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        self.past = [*self.past[-1:], Point(t, x_t, self.path.split(output, x_t, t)[0])]
        return self._onward(s)

    def _onward(self, s: Tensor) -> Tensor:
        """x_s = (σ_s / σ_t) x_t - α_s (e^{-h} - 1) (m + D / 2), where D is the slope of m between the last two points."""
        here = self.past[-1]
        ratio, growth, h = self._stride(here.t, s)
        data = here.data
        if len(self.past) == 2:
            before = self.past[0]
            past = self._stride(before.t, here.t)[2]
            share = torch.where((s < 0) | (past == 0), 0.0, 0.5 * h / past)  # 1 / 2r_0
            data = data + _wide(share) * (here.data - before.data)
        return _wide(ratio) * here.x - _wide(growth) * data

    def _stride(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """σ_s / σ_t, α_s (e^{-h} - 1) and h = λ_s - λ_t with λ = log α/σ, float64 [B]."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.path.exact_scales(t), self.path.exact_scales(s)
        h = (alpha_s / sigma_s).log() - (alpha_t / sigma_t).log()
        return sigma_s / sigma_t, alpha_s * torch.expm1(-h), h


class UniPc(Dpm):
    """UniPC-2 with B(h) = e^h - 1 (Zhao et al. 2023, alg. 1): its predictor is the step of DPM-Solver++(2M); the next
    prediction then corrects the point at which it was made."""

    def _step(self, output: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        data = self.path.split(output, x_t, t)[0]
        here = Point(t, self._corrected(data, t) if self.past else x_t, data)
        self.past = [*self.past[-1:], here]
        return self._onward(s)

    def _corrected(self, data: Tensor, t: Tensor) -> Tensor:
        """UniC: repeat the step that led here with the prediction here as an additional support point."""
        last = self.past[-1]
        ratio, growth, h = self._stride(last.t, t)
        now, before = torch.full_like(h, 0.5), torch.zeros_like(h)  # weights of the slopes to here, and from before
        if len(self.past) == 2:
            past = self._stride(self.past[0].t, last.t)[2]
            r = -past / h
            phi_1 = torch.expm1(-h) / -h
            phi_2 = (phi_1 - 1) / -h
            b_1, b_2 = phi_2 / phi_1, 2 * (phi_2 - 0.5) / -h / phi_1  # solve [1 1; r 1] · (before, now) = (b_1, b_2)
            before = (b_2 - b_1) / (r - 1)
            now = torch.where(past == 0, now, b_1 - before)
            before = torch.where(past == 0, 0.0, before / r)
        still = h == 0
        now, before = torch.where(still, 0.0, now), torch.where(still, 0.0, before)
        slope = _wide(now) * (data - last.data) + _wide(before) * (self.past[0].data - last.data)
        return _wide(ratio) * last.x - _wide(growth) * (last.data + slope)


SOLVERS: dict[enums.Sampler, type[Solver]] = {enums.Sampler.euler: Euler, enums.Sampler.dpm: Dpm, enums.Sampler.unipc: UniPc}


def _wide(row: Tensor) -> Tensor:
    """[B] → float32 [B 1 1 1]."""
    return row.float().view(-1, 1, 1, 1)
