"""Device memory of a training step, estimated before the first one.

Weights are counted. Forward and backward are measured with three small probes, once for a network
and a device, and extrapolated to the largest bucket at
the full batch: w + B (c + k · area), with w for memory that depends on weights only, c for the caption and k for the image.
Trained text encoders are counted by their weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..batch import Cond, ImageInfo, Size, Text
from ..dreambooth import DreamBooth
from ..measurement_cache import cached_measurement
from ..models.family import Family
from ..optimizer import state_bytes

SIDE = 16  # of the smaller probes, latent cells; at least the family's stride in cells


def estimate(module: DreamBooth, text: Text, shape: tuple[int, int], batch_size: int, average: bool) -> dict[str, int]:
    """Bytes on the device by purpose; of offloaded or divided blocks the largest is counted, which is copied one ahead,
    and this process's part of divided ones.

    Args:
        text: any caption's embedding; only its size matters.
        shape: height and width of the largest bucket, px.
        average: whether the EMA is on the device too.
    """
    learning = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    frozen, blocks = stored(p for p in module.parameters() if not p.requires_grad), module.family.offloaded()
    worked = working(module, text, shape, batch_size)
    own = sum(blocks) // module.family.shards if module.family.shards else 0
    parts = {
        "frozen weights": frozen - sum(blocks) + max(blocks, default=0) + own,
        "trainable weights": learning,
        "optimiser": state_bytes(module.cfg.optimizer._target_, module.trainable_parameters().values()),
        "average of the weights": learning if average else 0,
        f"activations of {batch_size} × {shape[1]} × {shape[0]} px": worked,
        "gradients, beyond the activations they replace": max(learning - worked, 0),
    }
    return {what: size for what, size in parts.items() if size}


def working(module: DreamBooth, text: Text, shape: tuple[int, int], batch_size: int) -> int:
    """Peak bytes of forward and backward for a batch of a shape (px), without the weights' gradients."""
    family = module.family
    unit = max(family.stride // family.factor, 1)
    small = unit * max(SIDE // unit, 1)
    large = 2 * small
    probes = ((small, 1), (large, 1), (small, 2))  # side, rows
    folder = Path(module.cfg.cache).expanduser() / "probes"
    alone, wide, both = cached_measurement(folder, _network(module, text), lambda: [_probe(module, text, *one) for one in probes])
    a_row = max(both - alone, 0)
    each = (wide - alone) / (large**2 - small**2)
    area = shape[0] * shape[1] / family.factor**2
    return max(int(alone - a_row + batch_size * (a_row + each * (area - small**2))), 0)


def _network(module: DreamBooth, text: Text) -> object:
    """Everything the probes depend on: the network, its settings, and the device."""
    device, cfg = module.family.device, module.cfg
    weights = [(name, type(p).__name__, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    groups = [OmegaConf.to_container(cfg[group], resolve=True) for group in ("model", "adapter", "quant")]
    shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in text.items()]
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return kind, weights, groups, shapes, module.family.shards > 0


def _probe(module: DreamBooth, text: Text, side: int, rows: int) -> int:
    """The peak of forward and backward through squares of `side` latent cells; each weight's gradient is freed at once."""
    asked = probe(module, text, side, side, rows)
    hooks = [p.register_post_accumulate_grad_hook(_free) for p in module.parameters() if p.requires_grad]
    as_it_is = torch.compiler.set_stance("force_eager")  # compiling for shapes that are used only once takes minutes
    try:
        with as_it_is, torch.random.fork_rng():
            return peak(lambda: module.predict(*asked).sum().backward(), module.family.device)
    finally:
        for hook in hooks:
            hook.remove()


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that `work` allocates in addition to the existing ones, by torch's profiler."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _NO_EXPERIMENT))
    try:
        work()
    finally:
        threads = _disable_profiler_legacy()
    now = most = 0
    for record in (record for thread in threads for record in thread if record.kind() == "memory_alloc"):
        now += record.cpu_memory_usage()
        most = max(most, now)
    return most


_NO_EXPERIMENT = torch._C._profiler._ExperimentalConfig()


def probe(module: DreamBooth, text: Text, height: int, width: int, rows: int = 1) -> tuple[Tensor, Tensor, Cond]:
    """Random latents: rows of a number of latent cells."""
    return inputs(module.family, text, height, width, rows)


def inputs(family: Family, text: Text, height: int, width: int, rows: int) -> tuple[Tensor, Tensor, Cond]:
    """Inputs of a family's denoiser: rows of a number of latent cells."""
    x_t = torch.zeros(rows, family.channels, height, width)
    shown = [ImageInfo(Size((64, 64), (0, 0), (64, 64)), latents, 0, 0, 7.0) for latents in x_t]
    cond = family.cond(Text.stack([text] * rows), shown).to(family.device)
    return x_t.to(family.device), torch.full((rows,), 0.5, device=family.device), cond


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages."""
    return sum(storage.nbytes() for tensor in tensors for storage in _storages(tensor))


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages of a tensor; a quantised weight is a wrapper around several tensors."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _storages(getattr(tensor, name))
