"""What a training step needs of the device's memory, estimated before the first one.

Weights are counted. Activations are measured: the forward passes of two small pictures tell what autograd keeps, as a
constant and a part that grows with the area, and so what the largest bucket at the full batch size will keep.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .batch import Cond, Size, Text
from .dreambooth import DreamBooth

PROBES = (8, 16)  # latent cells a side, times the family's stride in cells where that is more


def estimate(module: DreamBooth, text: Text, shape: tuple[int, int], batch_size: int, average: bool) -> dict[str, int]:
    """Bytes by purpose.

    Args:
        text: any caption's embedding; only its size matters.
        shape: height and width of the largest bucket, px.
        average: whether an average of the weights lies on the device too.
    """
    learning = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    frozen = sum(s.nbytes() for p in module.parameters() if not p.requires_grad for s in _storages(p))
    parts = {
        "frozen weights": frozen,
        "trainable weights": learning,
        "gradients": learning,
        "optimiser (AdamW's two moments)": 2 * learning,
        "average of the weights": learning if average else 0,
        f"activations of {batch_size} × {shape[1]} × {shape[0]} px": activations(module, text, shape) * batch_size,
    }
    return {what: size for what, size in parts.items() if size}


def activations(module: DreamBooth, text: Text, shape: tuple[int, int]) -> int:
    """Bytes that autograd keeps for one picture of a shape (px)."""
    family = module.family
    unit = max(family.stride // family.factor, 1)
    sides = [unit * max(side // unit, 1) for side in PROBES]
    (small, few), (large, many) = ((side * side, _kept(module, text, side)) for side in sides)
    each = (many - few) / (large - small)
    area = shape[0] * shape[1] / family.factor**2
    return max(int(few + each * (area - small)), 0)


def _kept(module: DreamBooth, text: Text, side: int) -> int:
    """Bytes of tensors kept for the backward pass, weights aside, for a square of `side` latent cells."""
    weights = {storage.data_ptr() for p in module.parameters() for storage in _storages(p)}
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen.update({s.data_ptr(): s.nbytes() for s in _storages(tensor) if s.data_ptr() not in weights})
        return tensor

    device = module.family.device
    x_t = torch.zeros(1, module.family.channels, side, side, device=device)
    cond = Cond(*(part.to(device) for part in module.family.cond(text, [Size((64, 64), (0, 0), (64, 64))])))
    as_it_is = torch.compiler.set_stance("force_eager")  # compiling for two shapes that never come again takes minutes
    with as_it_is, torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = module.predict(x_t, torch.full((1,), 0.5, device=device), cond)
    del answer
    return sum(seen.values())


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Where a tensor's bytes lie; a quantised weight is a wrapper around several."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _storages(getattr(tensor, name))
