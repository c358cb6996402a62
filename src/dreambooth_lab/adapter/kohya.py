"""The key layout of kohya's sd-scripts, which ComfyUI and A1111 read too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PREFIX = "lora_unet"
ENDS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}


def convert(layers: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """peft's keys (`a.b.to_q.lora_A.weight`) → kohya's (`lora_unet_a_b_to_q.lora_down.weight`), an `alpha` for each layer.

    The scale alpha / rank is what tools apply, so alpha must be written; DoRA's lengths become a column.
    """
    converted = {}
    for key, tensor in layers.items():
        layer, end = next((key.removesuffix("." + end), end) for end in ENDS if key.endswith("." + end))
        name = f"{PREFIX}_{layer.replace('.', '_')}"
        column = end == "lora_magnitude_vector" and tensor.dim() == 1
        converted[f"{name}.{ENDS[end]}"] = tensor[:, None].contiguous() if column else tensor
        converted[f"{name}.alpha"] = torch.tensor(float(alphas[layer]))
    return converted


def header(rank: int, alpha: float, algorithm: str) -> dict[str, str]:
    """What kohya's tools look for in a file's header."""
    said = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    return said | ({"ss_network_args": '{"dora_wd": "True"}'} if algorithm == "dora" else {})
