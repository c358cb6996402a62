"""torchao: weight-only int8, float8 and int4."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

INT4: Any = torch.int4  # type: ignore[attr-defined]
INT4_GROUP = 32


class TorchAO:
    """Weights by output channel; int4 in groups of 32, one byte per value (torchao's packed int4 needs CUDA and extra
    kernels), so it saves no more memory than int8."""

    def __init__(self, bits: str):
        self.bits = bits

    def _config(self, inputs: int) -> Any:
        if self.bits == "int4":
            return IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(gcd(INT4_GROUP, inputs)))
        return Int8WeightOnlyConfig() if self.bits == "int8" else Float8WeightOnlyConfig()

    def quantise(self, layer: nn.Linear) -> nn.Linear:
        quantize_(layer, self._config(layer.in_features))
        layer.weight.requires_grad_(False)
        return layer

    def pack(self, layer: nn.Linear) -> tuple[dict[str, Tensor], str]:
        parts, spec = flatten_tensor_state_dict({"layer.weight": layer.weight.data})
        return parts, json.dumps(spec)

    def unpack(self, layer: nn.Linear, parts: Mapping[str, Tensor], spec: str) -> nn.Linear:
        restored, _ = unflatten_tensor_state_dict(dict(parts), json.loads(spec))
        layer.weight = nn.Parameter(restored["layer.weight"], requires_grad=False)
        return layer
