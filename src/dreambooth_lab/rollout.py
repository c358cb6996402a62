"""Scheduled sampling: rows reach their time t as sampling would, by the model's own strides, instead of by fresh noise.

Training shows the network points on the path; sampling shows it points it has drifted to (exposure bias: Ning et al. 2023).
A rollout starts a few strides noisier, walks down to t with the current weights, and trains there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import cos, pi
from typing import NamedTuple, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor

from .batch import Batch, Cond
from .config import ConfigError, Ramp, RolloutKind, RolloutTarget
from .diffusion.path import Path
from .diffusion.solve import SOLVERS
from .diffusion.time import Shift, build_shift, shift

Predict = Callable[[Tensor, Tensor, Cond], Tensor]  # (x_t, t, cond) → the network's answer


class Reached(NamedTuple):
    """Where the rows are at their times t."""

    x_t: Tensor  # [B C h w]
    eps: Tensor  # [B C h w], the ε that the target is made of
    strayed: Tensor  # [B] bool: rows that are not on the path


class Rollout(Protocol):
    def __call__(self, x0: Tensor, batch: Batch, cond: Cond, t: Tensor, step: int) -> Reached: ...


class Direct:
    """No rollout: x_t = α_t x_0 + σ_t ε."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, x0: Tensor, batch: Batch, cond: Cond, t: Tensor, step: int) -> Reached:
        return Reached(self.path.noise(x0, batch.eps, t), batch.eps, torch.zeros_like(t, dtype=torch.bool))


def ramp(step: int, probability: float, ramp_steps: int, shape: Ramp) -> float:
    """Share of rows that roll out after `step` optimiser steps: rises from 0 to `probability` over `ramp_steps`, and stays.

    Linear in x = step / ramp_steps, or ½ - ½ cos(π x).
    """
    x = min(step / ramp_steps, 1.0) if ramp_steps else 1.0
    return probability * (x if shape is Ramp.linear else 0.5 - 0.5 * cos(pi * x))


class InputPerturbation:
    """x_t = α_t x_0 + σ_t (ε + γ ξ), answered with ε (Ning et al. 2023, alg. 1): drift imitated by more noise, at no cost."""

    def __init__(self, cfg: DictConfig, path: Path):
        self.cfg, self.path = cfg, path

    def __call__(self, x0: Tensor, batch: Batch, cond: Cond, t: Tensor, step: int) -> Reached:
        assert batch.xi is not None  # drawn whenever the configuration says input_perturbation
        due = batch.walk[:, 0] < ramp(step, self.cfg.probability, self.cfg.ramp_steps, self.cfg.ramp_shape)
        noise = torch.where(_wide(due), batch.eps + self.cfg.perturbation * batch.xi, batch.eps)
        return Reached(self.path.noise(x0, noise, t), batch.eps, due)


class Grid(NamedTuple):
    """The strides of a schedule: `number` of them on a clock where all are alike, before its time shift."""

    number: int
    shift: float

    def even(self, t: Tensor) -> Tensor:
        """t on the clock whose strides are all alike."""
        return shift(t, 1 / self.shift)

    def above(self, t: Tensor, strides: Tensor) -> Tensor:
        """The times so many strides above t [B]."""
        return torch.where(strides > 0, shift(self.even(t) + strides / self.number, self.shift), t)

    def room(self, t: Tensor, top: float) -> Tensor:
        """Whole strides between t [B] and the top."""
        return ((self.even(torch.full_like(t, top)) - self.even(t)) * self.number + 1e-9).floor().clamp(min=0)


class Walk:
    """Starts up to K strides above t and walks down, all rows at once, without gradient or dropout.

    Strides are those of inference: 1/grid of the schedule each (before its time shift). A row walks 1 … K of them, fewer where
    the top of the path is nearer; at most K batched forwards are made, of the rows still on their way. Rows that don't roll out,
    and those below `min_time` (where a correction divided by σ_t explodes), are exactly where `Direct` puts them.

    Args:
        top: t at which sampling begins.
        model_shift: the model's own time shift, for `shift: model`.
        predict: the network with its current weights.
        at_rest: enters a state without dropout.
    """

    def __init__(
        self, cfg: DictConfig, path: Path, top: float, model_shift: Shift, predict: Predict,
        at_rest: Callable[[], AbstractContextManager[None]],
    ):  # fmt: skip
        self.cfg, self.path, self.top, self.predict, self.at_rest = cfg, path, min(top, path.top), predict, at_rest
        self.shift = build_shift(cfg.shift, model_shift)
        self.grid = path.num_steps if cfg.grid == "native" else int(cfg.grid)

    def __call__(self, x0: Tensor, batch: Batch, cond: Cond, t: Tensor, step: int) -> Reached:
        grid = Grid(self.grid, self.shift(*x0.shape[2:]))
        length = self.lengths(batch.walk, t, step, grid)
        with torch.no_grad(), self.at_rest():
            x_t = self.walk(x0, batch.eps, cond, t, length, grid)
        strayed = length > 0
        if self.cfg.target is RolloutTarget.original:
            return Reached(x_t, batch.eps, strayed)
        eps = torch.where(_wide(strayed), self.path.implied_noise(x_t, x0, t), batch.eps)
        return Reached(x_t, eps, strayed)

    def lengths(self, walk: Tensor, t: Tensor, step: int, grid: Grid) -> Tensor:
        """Strides of each row [B], from its two draws [B 2]."""
        due = walk[:, 0] < ramp(step, self.cfg.probability, self.cfg.ramp_steps, self.cfg.ramp_shape)
        wish = 1 + (walk[:, 1] * self.cfg.max_step_offset).floor()
        room = grid.room(t, self.top)
        return torch.where(due & (t >= self.cfg.min_time), wish.minimum(room), 0.0).long()

    def walk(self, x0: Tensor, eps: Tensor, cond: Cond, t: Tensor, length: Tensor, grid: Grid) -> Tensor:
        """x̂_t after `length` strides [B] down to t."""
        solver = SOLVERS[self.cfg.sampler](self.path)
        x = self.path.noise(x0, eps, grid.above(t, length))
        for done in range(int(length.max())):
            left = (length - done).clamp(min=0)
            now, after = grid.above(t, left), grid.above(t, (left - 1).clamp(min=0))
            rows = left.nonzero()[:, 0]
            output = torch.zeros_like(x).index_copy(0, rows, self.predict(x[rows], now[rows], cond.take(rows)))
            x = solver.step(output, x, now, after)
        return x


class ReflexFlow:
    """Two terms for velocity networks that have strayed: where to turn, and what was lost on the way (ReflexFlow, Huang et al.
    2025, arXiv 2512.04904, a preprint its authors have withdrawn; DEFAR of 2026 keeps both terms).

    Written from accounts of the paper and its reimplementations, not from its text. Where it differs from SimpleTuner's:
    - Rows that are on the path have neither term; there the direction term is added to every row.
    - |b| is divided by its mean, so α is the mean extra weight whatever a sample's size. There the signed b is divided by its sum
      of magnitudes, which moves weights by α/(C h w) on average: not at all. Signed at our scale, some would be negative.
    - The mask of the loss holds for the direction too.
    Like there, nothing flows back through the walk. With adapter dropout, b also holds what dropout changed.

    Args:
        direction: β_1, weight of the term that turns the velocity towards x̂_t - x_0; 0 for none.
        frequency: α, extra weight where drift changes the answer most; 0 for none. Costs a forward of the strayed rows.
    """

    def __init__(self, direction: float, frequency: float, path: Path, predict: Predict):
        self.direction, self.frequency, self.path, self.predict = direction, frequency, path, predict

    def turn(self, output: Tensor, x_t: Tensor, x0: Tensor, strayed: Tensor, mask: Tensor | None) -> Tensor:
        """β_1 ‖v/‖v‖ - (x̂_t - x_0)/‖x̂_t - x_0‖‖² of strayed rows, inside their masks [B 1 h w]; 0 of the others [B]."""
        inside = torch.ones_like(x0[:, :1]) if mask is None else mask
        apart = (_unit(inside * output.float()) - _unit(inside * (x_t - x0))).square().sum((1, 2, 3))
        return self.direction * torch.where(strayed, apart, 0.0)

    def weigh(
        self, penalty: Callable[[Tensor], Tensor], output: Tensor, batch: Batch, cond: Cond, t: Tensor, strayed: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """A penalty (difference → error, by element) times `lost`."""
        weight = self.lost(output, batch, cond, t, strayed)
        return lambda difference: weight * penalty(difference)

    @torch.no_grad()
    def lost(self, output: Tensor, batch: Batch, cond: Cond, t: Tensor, strayed: Tensor) -> Tensor:
        """1 + α |b| / mean|b| of strayed rows, 1 of others [B C h w]; b: the answer on the path less the answer off it."""
        weight, rows = torch.ones_like(output), strayed.nonzero()[:, 0]
        if not self.frequency or len(rows) == 0:
            return weight
        on_path = self.path.noise(batch.latents(), batch.eps, t)[rows]
        bias = (self.predict(on_path, t[rows], cond.take(rows)) - output[rows]).abs()
        share = bias / bias.mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(bias.dtype).tiny)
        return weight.index_copy(0, rows, 1 + self.frequency * share)


def build_rollout(
    cfg: DictConfig, path: Path, top: float, model_shift: Shift, predict: Predict,
    at_rest: Callable[[], AbstractContextManager[None]],
) -> Rollout:  # fmt: skip
    if not cfg.enabled:
        return Direct(path)
    if cfg.kind is RolloutKind.input_perturbation:
        return InputPerturbation(cfg, path)
    return Walk(cfg, path, top, model_shift, predict, at_rest)


def build_reflexflow(cfg: DictConfig, path: Path, predict: Predict) -> ReflexFlow | None:
    """The extra terms, if any is asked for.

    Raises:
        ConfigError: the model's path is not straight, so it has no velocity.
    """
    terms = cfg.reflexflow
    if not cfg.enabled or not (terms.direction or terms.frequency):
        return None
    if not path.straight:
        raise ConfigError(
            f"rollout.reflexflow is direction={terms.direction:g}, frequency={terms.frequency:g}, but this model does not "
            "predict a flow's velocity; set both to 0"
        )
    return ReflexFlow(terms.direction, terms.frequency, path, predict)


def _unit(x: Tensor) -> Tensor:
    return x / x.flatten(1).norm(dim=1).clamp(min=1e-8).view(-1, 1, 1, 1)


def _wide(row: Tensor) -> Tensor:
    return row.view(-1, 1, 1, 1)
