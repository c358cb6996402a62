"""LoRA's branch in the base's own dtype.

The trained factors A and B are float32. With a base of lower precision, peft's branch runs in float32: it saves a second copy of
every input for backward and moves twice the bytes, for a precision that the base's rounding has already lost. Here a layer
computes
    y = W x + s B (A x)

with A and B rounded to the base's dtype once after each change, and the update added by the matrix product that computes it.
Backward saves only the layer's input, which is shared between layers with the same input, and A x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

ROUNDED, LENGTHS = "_rounded", "_lengths"  # attributes for tensors derived from a layer's factors; not saved
T = TypeVar("T")
_steps = [0]  # counts the steps of all optimisers: fused and 8-bit ones don't increment a parameter's version


def _count(*_: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count)


class LowPrecision(LoraVariant):
    """Replaces peft's branch; with a float32 base peft's own branch is used, bit for bit."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """
        Args:
            x: the layer's input [… in], or [B C H W].
            result: W x [… out] or [B C' H' W'], in the branch's dtype.
        """
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scale = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        if result.dtype is torch.float32:
            return result + up(down(dropout(x.float()))) * scale
        a, b = rounded(module, down.weight, up.weight, result.dtype)
        return _added(down, dropout(x.to(result.dtype)), result, a, b, scale)


class LowPrecisionDora:
    """The same for DoRA, which multiplies W + s B A by m / |W + s B A|, one factor per output. Mixed with peft's own class,
    which is used with a float32 base and with dropout. The norms |W + s B A|, for which peft builds the whole matrix in every
    forward, are computed once until a factor changes; as in peft, no gradient flows through them."""

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scale = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        drops = module.training and not isinstance(dropout, nn.Identity)
        if result.dtype is torch.float32 or drops:
            own: Any = super()
            return own.forward(module, active_adapter=active_adapter, x=x.float(), result=result, **kwargs)
        a, b = rounded(module, down.weight, up.weight, result.dtype)
        moved = _added(down, x.to(result.dtype), result, a, b, scale)  # (W + s B A) x + bias
        length = module.lora_magnitude_vector[active_adapter].weight.flatten()
        more = (length / lengths(module, down.weight, up.weight, scale) - 1).to(result.dtype)  # 1 + it would round to 1
        bias = module.get_base_layer().bias
        shape = (1, -1, 1, 1) if isinstance(down, nn.Conv2d) else (-1,)
        longer = torch.addcmul(moved, moved, more.view(shape))
        return longer if bias is None else longer - (more * bias.to(more.dtype)).view(shape)


def _added(down: nn.Module, x: Tensor, result: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """result + s B (A x)."""
    if isinstance(down, nn.Conv2d):
        return torch.add(result, F.conv2d(down._conv_forward(x, a, None), b), alpha=scale)
    hidden = F.linear(x, a)
    return torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), b.t(), alpha=scale).view(result.shape)


def use(model: nn.Module, adapter: str) -> None:
    """Make every LoRA layer of a model use this branch."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
            own = layer.lora_variant.get(adapter)
            mixed = type("Mixed", (LowPrecisionDora, type(own)), {}) if own else LowPrecision
            layer.lora_variant[adapter] = mixed()
            layer.cast_input_dtype_enabled = False


def rounded(layer: nn.Module, a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B in a dtype, differentiable repeatedly."""
    return _kept(layer, ROUNDED, (a, b), dtype, lambda: (a.to(dtype), b.to(dtype)))


def lengths(layer: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + s B A| of each output, float32 [out], without gradient."""

    def made() -> Tensor:
        with torch.no_grad():
            weight = dequantize_module_weight(layer.get_base_layer()).to(torch.float32)
            return torch.linalg.vector_norm(torch.addmm(weight.flatten(1), b.flatten(1), a.flatten(1), alpha=scale), dim=1)

    return _kept(layer, LENGTHS, (a, b), scale, made)


def _kept(layer: nn.Module, name: str, factors: tuple[Tensor, Tensor], other: object, make: Callable[[], T]) -> T:
    """Cache a result computed from the factors until one of them changes."""
    if torch.compiler.is_compiling():  # the compiler fuses the computation with what follows
        return make()
    state = (other, _steps[0], *((factor.untyped_storage()._cdata, factor._version) for factor in factors))
    kept = layer.__dict__.get(name)
    if kept is None or kept[0] != state:
        with torch.inference_mode(False), torch.enable_grad():
            kept = state, make()
        layer.__dict__[name] = kept
    made: T = kept[1]
    return made
