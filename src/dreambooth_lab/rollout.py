"""Scheduled sampling: x_t comes from a few sampler steps of the current model instead of from fresh noise.

Training shows the network points on the path. Sampling shows it points that have drifted off it (exposure bias: Ning et al.
2023). A rollout starts a few sampler steps above t, samples down to t with the current weights, and the loss is taken there.

The bias, even for a perfect model: a rollout from s to t is deterministic, so its end x̂_t contains only the information of its
start: E[x_0 | x̂_t] = E[x_0 | x_s]. This is blurrier than E[x_0 | x_t], and it becomes the loss's optimum. For Gaussian data N(0,
v), with V_t = α_t² v + σ_t², the optimal x_0 is the exact one times

    E_k[ α_s/α_t · √(V_t/V_s) ],  s = t + k steps, k = 1 … K;  for v = 1 and α² + σ² = 1 that is  E_k[ α_{t+k/N} / α_t ].

On SD's schedule at t = .5 this is .994 for K = 4 native steps (N = 1000), .987 for 10, and .79 for 4 of 28 steps; with
`target: original` the last is .82. Hence the default of few native steps. Longer steps show the network more drift, with more
bias.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import cos, pi
from typing import NamedTuple, Protocol

import torch
from omegaconf import DictConfig
from torch import Tensor

from .batch import Batch, Cond, to_device
from .config import ConfigError, enums
from .diffusion.path import Path
from .diffusion.solve import SOLVERS
from .diffusion.time import Shift, build_shift, shift

Predict = Callable[[Tensor, Tensor, Cond], Tensor]  # (x_t, t, cond) → the network's prediction


class NoisedSample(NamedTuple):
    """The network's inputs at times t, and the noise of the target."""

    x_t: Tensor  # [B C h w]
    eps: Tensor  # [B C h w], the ε of the target
    rolled_out: Tensor  # [B] bool, on the host: rows whose x_t is off the path


class Rollout(Protocol):
    """`when`: times t [B], on the host like the draws, so that the number of steps is known without a device synchronisation."""

    def __call__(self, x0: Tensor, batch: Batch, cond: Cond, when: Tensor, step: int) -> NoisedSample: ...


class NoRollout:
    """No rollout: x_t = α_t x_0 + σ_t ε."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, x0: Tensor, batch: Batch, cond: Cond, when: Tensor, step: int) -> NoisedSample:
        x_t = self.path.noise(x0, batch.eps, to_device(when, x0.device))
        return NoisedSample(x_t, batch.eps, torch.zeros_like(when, dtype=torch.bool))


def ramp(step: int, probability: float, ramp_steps: int, shape: enums.Ramp) -> float:
    """Probability that a row is rolled out after `step` optimiser steps: rises from 0 to `probability` over `ramp_steps`.

    Linear in x = step / ramp_steps, or ½ - ½ cos(π x).
    """
    x = min(step / ramp_steps, 1.0) if ramp_steps else 1.0
    return probability * (x if shape is enums.Ramp.linear else 0.5 - 0.5 * cos(pi * x))


class InputPerturbation:
    """x_t = α_t x_0 + σ_t (ε + γ ξ) with target ε (Ning et al. 2023, alg. 1): imitates drift by extra noise, at no cost."""

    def __init__(self, cfg: DictConfig, path: Path):
        self.cfg, self.path = cfg, path

    def __call__(self, x0: Tensor, batch: Batch, cond: Cond, when: Tensor, step: int) -> NoisedSample:
        assert batch.xi is not None  # drawn whenever rollout.kind is input_perturbation
        due = batch.rollout_draws[:, 0] < ramp(step, self.cfg.probability, self.cfg.ramp_steps, self.cfg.ramp_shape)
        noise = torch.where(_wide(to_device(due, x0.device)), batch.eps + self.cfg.perturbation * batch.xi, batch.eps)
        return NoisedSample(self.path.noise(x0, noise, to_device(when, x0.device)), batch.eps, due)


class Grid(NamedTuple):
    """A sampler's schedule of `number` steps, uniform before the time shift."""

    number: int
    shift: float

    def even(self, t: Tensor) -> Tensor:
        """t before the time shift, where all steps have the same length."""
        return shift(t, 1 / self.shift)

    def above(self, t: Tensor, steps: Tensor) -> Tensor:
        """The times that are `steps` steps above t [B]."""
        return torch.where(steps > 0, shift(self.even(t) + steps / self.number, self.shift), t)

    def room(self, t: Tensor, top: float) -> Tensor:
        """Number of whole steps between t [B] and the top."""
        return ((self.even(torch.full_like(t, top)) - self.even(t)) * self.number + 1e-9).floor().clamp(min=0)


class ModelRollout:
    """Starts up to K sampler steps above t and samples down to it, all rows at once, without gradient or dropout.

    A step is as long as at inference: 1/grid of the schedule (before its time shift). A row takes 1 … K steps, fewer near the
    top of the path. There are at most K batched forward passes, each of the rows that have steps left. Rows that are not
    rolled out, and rows below `min_time` (where a correction divided by σ_t explodes), get exactly the x_t of `NoRollout`.

    Args:
        top: t at which sampling begins.
        model_shift: the model's own time shift, for `shift: model`.
        predict: the network with its current weights.
        dropout_off: context manager without dropout.
    """

    def __init__(
        self, cfg: DictConfig, path: Path, top: float, model_shift: Shift, predict: Predict,
        dropout_off: Callable[[], AbstractContextManager[None]],
    ):  # fmt: skip
        self.cfg, self.path, self.top, self.predict, self.dropout_off = cfg, path, min(top, path.top), predict, dropout_off
        self.shift = build_shift(cfg.shift, model_shift)
        self.grid = path.num_steps if cfg.num_steps == "native" else int(cfg.num_steps)

    def __call__(self, x0: Tensor, batch: Batch, cond: Cond, when: Tensor, step: int) -> NoisedSample:
        grid = Grid(self.grid, self.shift(*x0.shape[2:]))
        length = self.rollout_steps(batch.rollout_draws, when, step, grid)
        with torch.no_grad(), self.dropout_off():
            x_t = self.roll_out(x0, batch.eps, cond, when, length, grid)
        rolled_out = length > 0
        if self.cfg.target is enums.RolloutTarget.original:
            return NoisedSample(x_t, batch.eps, rolled_out)
        implied = self.path.implied_noise(x_t, x0, to_device(when, x0.device))
        eps = torch.where(_wide(to_device(rolled_out, x0.device)), implied, batch.eps)
        return NoisedSample(x_t, eps, rolled_out)

    def rollout_steps(self, draws: Tensor, t: Tensor, step: int, grid: Grid) -> Tensor:
        """Number of steps of each row [B], from its two draws [B 2]."""
        due = draws[:, 0] < ramp(step, self.cfg.probability, self.cfg.ramp_steps, self.cfg.ramp_shape)
        wish = 1 + (draws[:, 1] * self.cfg.max_step_offset).floor()
        room = grid.room(t, self.top)
        return torch.where(due & (t >= self.cfg.min_time), wish.minimum(room), 0.0).long()

    def roll_out(self, x0: Tensor, eps: Tensor, cond: Cond, t: Tensor, length: Tensor, grid: Grid) -> Tensor:
        """x̂_t after `length` steps [B] down to t, both on the host."""
        solver, device = SOLVERS[self.cfg.sampler](self.path), x0.device
        x = self.path.noise(x0, eps, to_device(grid.above(t, length), device))
        for done in range(int(length.max())):
            left = (length - done).clamp(min=0)
            now = to_device(grid.above(t, left), device)
            after = to_device(grid.above(t, (left - 1).clamp(min=0)), device)
            rows = to_device(left.nonzero()[:, 0], device)
            output = torch.zeros_like(x).index_copy(0, rows, self.predict(x[rows], now[rows], cond.select(rows)))
            x = solver.step(output, x, now, after)
        return x


class ReflexFlow:
    """Two loss terms for rolled-out rows of velocity networks: the direction term and the frequency weight (ReflexFlow, Huang et
    al. 2025, arXiv 2512.04904, a preprint its authors have withdrawn; DEFAR of 2026 keeps both terms).

    Written from descriptions of the paper and its reimplementations, not from its text. Differences from SimpleTuner:
    - Rows on the path have neither term. SimpleTuner adds the direction term to every row.
    - |b| is divided by its mean, so α is the mean extra weight at any sample size. SimpleTuner divides the signed b by its sum of
      magnitudes, which changes weights by only α/(C h w) on average; signed at our scale, some weights would be negative.
    - The loss mask applies to the direction term too.
    As in SimpleTuner, no gradient flows through the rollout. With adapter dropout, b includes the change by dropout.

    Args:
        direction: β_1, weight of the direction term, which pulls the velocity towards x̂_t - x_0; 0: off.
        frequency: α, mean extra weight where drift changes the prediction most; 0: off. Costs one forward of the rolled-out rows.
    """

    def __init__(self, direction: float, frequency: float, path: Path, predict: Predict):
        self.direction, self.frequency, self.path, self.predict = direction, frequency, path, predict

    def direction_loss(self, output: Tensor, x_t: Tensor, x0: Tensor, rolled_out: Tensor, mask: Tensor | None) -> Tensor:
        """β_1 ‖v/‖v‖ - (x̂_t - x_0)/‖x̂_t - x_0‖‖² of rolled-out rows inside their masks [B 1 h w]; 0 for the others [B]."""
        inside = torch.ones_like(x0[:, :1]) if mask is None else mask
        apart = (_unit(inside * output.float()) - _unit(inside * (x_t - x0))).square().sum((1, 2, 3))
        return self.direction * torch.where(rolled_out, apart, 0.0)

    def weighted_penalty(
        self, penalty: Callable[[Tensor], Tensor], output: Tensor, batch: Batch, cond: Cond, t: Tensor, rolled_out: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """An elementwise loss (difference → error) times `frequency_weight`."""
        weight = self.frequency_weight(output, batch, cond, t, rolled_out)
        return lambda difference: weight * penalty(difference)

    @torch.no_grad()
    def frequency_weight(self, output: Tensor, batch: Batch, cond: Cond, t: Tensor, rolled_out: Tensor) -> Tensor:
        """1 + α |b| / mean|b| for rolled-out rows, 1 for the others [B C h w]; b: prediction on the path - prediction off it."""
        weight, rows = torch.ones_like(output), to_device(rolled_out.nonzero()[:, 0], output.device)
        if not self.frequency or len(rows) == 0:
            return weight
        on_path = self.path.noise(batch.latents(), batch.eps, t)[rows]
        bias = (self.predict(on_path, t[rows], cond.select(rows)) - output[rows]).abs()
        share = bias / bias.mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(bias.dtype).tiny)
        return weight.index_copy(0, rows, 1 + self.frequency * share)


def build_rollout(
    cfg: DictConfig, path: Path, top: float, model_shift: Shift, predict: Predict,
    dropout_off: Callable[[], AbstractContextManager[None]],
) -> Rollout:  # fmt: skip
    if not cfg.enabled:
        return NoRollout(path)
    if cfg.kind is enums.RolloutKind.input_perturbation:
        return InputPerturbation(cfg, path)
    return ModelRollout(cfg, path, top, model_shift, predict, dropout_off)


def build_reflexflow(cfg: DictConfig, path: Path, predict: Predict) -> ReflexFlow | None:
    """ReflexFlow's terms, or None if both are off.

    Raises:
        ConfigError: the model does not predict a flow's velocity.
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
