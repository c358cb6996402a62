"""What a computation costs on a card that is not there: floating-point operations, bytes moved, memory, a roofline time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ...fake_tensors import LiveBytes

FREE = {"aten.detach", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten._unsafe_view", "aten.alias", "prim.device"}


class Card(NamedTuple):
    """A GPU's peaks, as its maker states them without sparsity."""

    name: str
    low: float  # FLOP/s in bfloat16
    full: float  # FLOP/s in float32 outside of tensor cores, which is torch's default
    bandwidth: float  # bytes/s
    memory: int  # GiB


CARDS = (
    Card("H100", 990e12, 67e12, 3.35e12, 80),
    Card("A100", 312e12, 19.5e12, 1.94e12, 80),
    Card("RTX 4090", 165e12, 82e12, 1.01e12, 24),
    Card("RTX 3090", 71e12, 35.6e12, 0.94e12, 24),
)
COMPUTE, MEMORY = 0.6, 0.8  # shares of the peaks that good kernels reach
LAUNCH = 2e-6  # seconds that a kernel takes at least


class Meter(LiveBytes):
    """Counts what runs inside. Storages that exist before it, such as weights, are not counted as memory.

    A kernel takes the longest of its arithmetic at `COMPUTE` of the card's peak, its bytes at `MEMORY` of the bandwidth, and
    `LAUNCH` (the roofline model, Williams et al. 2009). Every operator is a kernel of its own; nothing overlaps.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__(before)
        self.kernels = 0
        self.flops, self.moved = Counter[str](), Counter[str]()  # by dtype
        self.seconds = dict.fromkeys((card.name for card in CARDS), 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self.track(tensor)
        if func.is_view or str(func._overloadpacket) in FREE or not any(tensor.numel() for tensor in made):
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self._add((given or made)[0].dtype, flops, sum(t.numel() * t.element_size() for t in given + made))
        return out

    def _add(self, dtype: torch.dtype, flops: int, moved: int) -> None:
        name = str(dtype).removeprefix("torch.")
        self.kernels += 1
        self.flops[name] += flops
        self.moved[name] += moved
        for card in CARDS:
            peak = card.full if dtype in (torch.float32, torch.float64) else card.low
            self.seconds[card.name] += max(flops / (peak * COMPUTE), moved / (card.bandwidth * MEMORY), LAUNCH)
