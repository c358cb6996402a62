"""FLOPs of a run, and which share of the device's peak it uses."""

from __future__ import annotations

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.throughput import get_available_flops, measure_flops
from torch.utils.flop_counter import FlopCounterMode

from ..batch import Text
from ..data.module import DreamBoothData
from ..data.sampling.schedule import Bucket
from ..dreambooth import DreamBooth
from .memory import probe


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """The specified peak FLOP/s of the device for dense matrix products of this type; None if unknown."""
    return get_available_flops(device, dtype) if device.type == "cuda" else None


def step_flops(module: DreamBooth, data: DreamBoothData, batches: int = 8) -> float:
    """FLOPs of an optimiser step on one device, as torch counts them, the teacher and rollouts included.

    The mean over the first batches of the data, which are computed once more. Weights and random generators stay as they are.
    """
    with (
        torch.compiler.set_stance("force_eager"),
        torch.random.fork_rng(),
        torch.enable_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        for number in range(batches):
            batch = move_data_to_device(data.build(data.schedule.batch(number)), module.family.device)
            module.training_step(batch, number)["loss"].backward()
    module.zero_grad(set_to_none=True)
    return counter.get_total_flops() / batches * module.cfg.trainer.accumulate_grad_batches


def row_flops(module: DreamBooth, text: Text, buckets: list[Bucket]) -> float:
    """FLOPs of one row's forward and backward pass, counted, not timed; the mean over buckets, weighted by their rows.

    The teacher's forward pass and rollouts are not counted.
    """
    rows = [sum(group.rows for group in bucket.groups) for bucket in buckets]
    counted = [_of_shape(module, text, bucket.shape) for bucket in buckets]
    return sum(n * flops for n, flops in zip(rows, counted, strict=True)) / sum(rows)


def _of_shape(module: DreamBooth, text: Text, shape: tuple[int, int]) -> int:
    inputs = probe(module, text, shape[0] // module.family.factor, shape[1] // module.family.factor)
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(), torch.enable_grad():
        flops = measure_flops(module, lambda: module.predict(*inputs), lambda prediction: prediction.square().mean())
    module.zero_grad(set_to_none=True)
    return flops
