"""bitsandbytes: 4-bit NormalFloat weights (Dettmers et al. 2023, QLoRA), on CPU and CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

DATA = "data"


class NF4:
    """Blocks of 64 weights with an absolute maximum each."""

    def _empty(self, layer: nn.Linear, dtype: torch.dtype) -> Linear4bit:
        with torch.device("meta"):
            empty = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype, False, "nf4")
        empty.bias = layer.bias
        # Otherwise an evaluation on a CPU with AVX512-BF16 repacks the weights for a kernel without gradient.
        empty.support_avx512bf16_for_cpu = False
        return empty

    def quantise(self, layer: nn.Linear) -> nn.Linear:
        quantised = self._empty(layer, layer.weight.dtype)
        options: dict[str, Any] = {"requires_grad": False, "compress_statistics": False, "quant_type": "nf4", "module": quantised}
        weight: Any = Params4bit(layer.weight.data, **options)
        weight = weight.to(layer.weight.device)
        quantised.weight = weight if weight.bnb_quantized else weight._quantize(layer.weight.device)
        return quantised

    def pack(self, layer: nn.Linear) -> tuple[dict[str, Tensor], str]:
        assert isinstance(layer, Linear4bit)
        weight: Any = layer.weight
        return {DATA: weight.data, **weight.quant_state.as_dict(packed=True)}, str(layer.compute_dtype)

    def unpack(self, layer: nn.Linear, parts: Mapping[str, Tensor], spec: str) -> nn.Linear:
        quantised = self._empty(layer, getattr(torch, spec.removeprefix("torch.")))
        state = {name: part for name, part in parts.items() if name != DATA}
        device = parts[DATA].device
        quantised.weight = Params4bit.from_prequantized(parts[DATA], state, device=device, module=quantised)
        return quantised
