"""LoRA as diffusers' training scripts run it, to compare with: factors in float32, everything under CUDA's autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# The operators that torch.autocast("cuda") runs in 16 bits, and in float32, of those that denoisers use (torch.amp's docs).
LOW = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, torch.baddbmm, F.scaled_dot_product_attention, torch.addmm}
HIGH = {
    F.layer_norm, F.group_norm, torch.group_norm, torch.layer_norm, F.softmax, torch.softmax, F.mse_loss, torch.pow, torch.sum,
    torch.exp,
}  # fmt: skip


class Autocast(TorchFunctionMode):
    """`torch.autocast("cuda", torch.bfloat16)`, which fake tensors on a CPU don't have: casts what operators take."""

    def __init__(self) -> None:
        super().__init__()
        self.cast = dict[int, Tensor]()  # of parameters that learn; autocast keeps these for the whole forward

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        dtype = torch.bfloat16 if func in LOW else torch.float32 if func in HIGH else None
        if dtype is not None:
            args, kwargs = (tree_map(lambda leaf: self._to(leaf, dtype), given) for given in (args, kwargs))
        return func(*args, **kwargs)

    def _to(self, leaf: Any, dtype: torch.dtype) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dtype in (dtype, torch.float64):
            return leaf
        if not isinstance(leaf, nn.Parameter) or not leaf.requires_grad or dtype is torch.float32:
            return leaf.to(dtype)
        if id(leaf) not in self.cast:
            self.cast[id(leaf)] = leaf.to(dtype)
        return self.cast[id(leaf)]


def stock(model: nn.Module) -> None:
    """Let a model's LoRA layers take peft's own branch."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_variant.clear()
            layer.cast_input_dtype_enabled = True
