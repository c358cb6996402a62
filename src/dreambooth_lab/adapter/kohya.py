"""The key layout of kohya's sd-scripts with diffusers' names of the blocks, as ComfyUI and A1111 read it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ENDS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def convert(prefix: str, layers: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """peft's keys (`a.b.to_q.lora_A.weight`) → kohya's (`lora_unet_a_b_to_q.lora_down.weight`), an `alpha` for each layer, since
    tools apply alpha / rank.

    Args:
        prefix: what the layout calls the model: lora_unet, lora_te1, …
    """
    converted = {}
    for key, tensor in layers.items():
        layer, end = next((key.removesuffix("." + end), end) for end in ENDS if key.endswith("." + end))
        name = f"{prefix}_{layer.replace('.', '_')}"
        converted[f"{name}.{ENDS[end]}"] = tensor
        converted[f"{name}.alpha"] = torch.tensor(float(alphas[layer]))
    return converted


def header(rank: int, alpha: float) -> dict[str, str]:
    """What kohya's tools look for in a file's header."""
    return {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
