"""optimum-quanto: int8, int4, int2 and float8 weights, on CPU and CUDA."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from optimum.quanto import QLinear, qfloat8, qint2, qint4, qint8
from optimum.quanto.library import qbytes_mm
from optimum.quanto.library.extensions import get_extension
from optimum.quanto.tensor.weights import WeightQBitsTensor
from torch import Tensor, nn

TYPES = {"int8": qint8, "int4": qint4, "int2": qint2, "fp8": qfloat8}


class _FixedWeight(torch.autograd.Function):
    """x Wᵀ + b of a frozen quantised weight: only W is saved for backward, whereas quanto saves x too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return torch.matmul(grads[0], weight), None, None


class FixedLinear(QLinear):
    """quanto's layer for a frozen base."""

    def forward(self, x: Tensor) -> Tensor:
        """[… in] → [… out]."""
        return _FixedWeight.apply(x, self.qweight, self.bias)


class Quanto:
    """Symmetric int8 and float8 by output channel; int4 and int2 in groups of 128 with a shift."""

    def __init__(self, bits: str):
        self.type = TYPES[bits]
        _patch()

    def quantise(self, layer: nn.Linear) -> nn.Linear:
        quantised = FixedLinear.from_module(layer, weights=self.type)
        quantised.freeze()
        return quantised

    def pack(self, layer: nn.Linear) -> tuple[dict[str, Tensor], str]:
        state = layer.state_dict()
        return {name: part for name, part in state.items() if name.startswith("weight.")}, ""

    def unpack(self, layer: nn.Linear, parts: Mapping[str, Tensor], spec: str) -> nn.Linear:
        quantised = FixedLinear.from_module(layer, weights=self.type)
        quantised.load_state_dict(dict(parts), strict=False, assign=True)
        quantised.bias = layer.bias
        for name in ("input_scale", "output_scale"):  # of activations, which are not quantised
            setattr(quantised, name, torch.ones((), device=parts["weight._scale"].device))
        return quantised


def _patch() -> None:
    """On the CPU quanto picks fast kernels that fail: int8 with bfloat16 crashes the process (K % 16 ≠ 0, or unaligned
    weights), int4 with bfloat16 refuses layers whose outputs are no multiple of 16, and unpacking int4 and int2 compiles a C++
    extension into site-packages. Its pure-torch code gives the same results. Other devices use its kernels."""
    if hasattr(WeightQBitsTensor, "dreambooth_lab"):
        return
    WeightQBitsTensor.dreambooth_lab = True
    fast_mm, pick = qbytes_mm.qbytes_int8pack_mm, WeightQBitsTensor.create

    def int8_mm(activations: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
        safe = activations.device.type == "cpu"
        return (qbytes_mm.qbytes_mm if safe else fast_mm)(activations, weights, scales)

    def create(qtype: Any, axis: Any, group: Any, size: Any, stride: Any, data: Tensor, *scale_shift: Any) -> Any:
        safe = data.device.type == "cpu"
        return (WeightQBitsTensor if safe else pick)(qtype, axis, group, size, stride, data, *scale_shift)

    qbytes_mm.qbytes_int8pack_mm, WeightQBitsTensor.create = int8_mm, staticmethod(create)
    if not torch.cuda.is_available():
        get_extension("quanto_cpp")._lib = types.SimpleNamespace(unpack=_unpack)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)]).to(torch.uint8)
