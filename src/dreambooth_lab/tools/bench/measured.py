"""Training steps of a configuration, timed on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from ...adapter import low_precision
from ...adapter.peft_layout import NAME
from ...batch import Batch, Cond
from ...config import ConfigError
from ...data.module import Samples
from ...dreambooth import DreamBooth
from ...profiling import memory, speed
from ..common.training import build_training
from .autocast import stock

WARM = 2  # steps before any is timed


class Measured(NamedTuple):
    """Measurements of a step; seconds are medians."""

    rows: int
    step: float  # seconds: the batch, both passes, the optimiser
    denoiser: float  # seconds of one forward and backward of the denoiser alone, at the same size
    autocast: float | None  # the same as diffusers' training scripts run it; None if that was not asked for
    spread: tuple[float, float]  # the fastest and the slowest step, seconds
    flops: float  # of the denoiser's two passes
    peak_flops: float | None  # FLOP/s that the card's maker states; None where that is not known
    memory: int  # bytes at the worst moment of a step

    @property
    def share(self) -> float | None:
        """Of the card's peak."""
        return self.flops / self.step / self.peak_flops if self.peak_flops else None


def measure(cfg: DictConfig, steps: int, against_autocast: bool = False) -> Measured:
    """Steps as a run takes them, callbacks aside; between two of them, the denoiser alone, so that noise hits all alike.

    Raises:
        ConfigError: autocast was asked for, and the adapter has no such branch.
    """
    if against_autocast and cfg.adapter.algorithm != "lora":
        raise ConfigError(f"--against_autocast compares LoRA, but adapter.algorithm is {cfg.adapter.algorithm!r}; leave it out")
    module, data = build_training(cfg)
    device, rows = module.family.device, cfg.dataset.batch_size
    stream = (move_data_to_device(batch, device) for batch in Samples(data, data.schedule, 0, 0, 1))
    optimizer = module.configure_optimizers()["optimizer"]
    step = _step(module, optimizer, stream, cfg.trainer.gradient_clip_norm)
    shapes = list[tuple[int, int]]()
    whole, alone, cast = list[float](), list[float](), list[float]()
    for i in range(WARM + steps):
        seconds = _seconds(lambda: shapes.append(step()), device)
        alone_once = partial(_denoise, module, memory.probe(module, data.text(""), *shapes[-1], rows))
        denoiser = _seconds(alone_once, device)
        autocast = _autocast(module, alone_once, device) if against_autocast else None
        module.zero_grad()
        if i >= WARM:
            whole.append(seconds)
            alone.append(denoiser)
            cast += [autocast] if autocast else []
    needed = memory.stored(_held(module, optimizer)) + memory.peak(step, device)
    flops = rows * speed.row_flops(module, data.text(""), data.schedule.buckets)
    promised = speed.peak(device, getattr(torch, cfg.model.dtype.value))
    return Measured(
        rows, median(whole), median(alone), median(cast) if cast else None, (min(whole), max(whole)), flops, promised, needed
    )


def _denoise(module: DreamBooth, inputs: tuple[Tensor, Tensor, Cond]) -> None:
    module.predict(*inputs).square().mean().backward()


def _autocast(module: DreamBooth, denoise: Callable[[], None], device: torch.device) -> float:
    """Seconds of the same with peft's own branch under autocast; afterwards the layers have ours again."""
    stock(module)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            return _seconds(denoise, device)
    finally:
        low_precision.use(module, NAME)


def _step(module: DreamBooth, optimizer: Optimizer, stream: Iterator[Batch], clip: float) -> Callable[[], tuple[int, int]]:
    """Takes one optimiser step; returns the latents' height and width."""

    def take() -> tuple[int, int]:
        batch = next(stream)
        module.training_step(batch, 0)["loss"].backward()
        if clip:
            clip_grad_norm_(module.trainable_parameters().values(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return batch.mean.shape[2], batch.mean.shape[3]

    return take


def _held(module: DreamBooth, optimizer: Optimizer) -> Iterator[Tensor]:
    yield from module.parameters()
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
