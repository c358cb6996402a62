"""Layer names round-trip through kohya's layout, from diffusers' names and from Stable Diffusion's original names."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from test_kohya import real  # noqa: F401

import tiny_families
from dreambooth_lab.adapter import kohya


@pytest.mark.parametrize("name", sorted(tiny_families.PIPELINES))
def test_layer_names_of_all_families_round_trip(name):
    pipeline = tiny_families.PIPELINES[name]()
    for part in ("unet", "transformer"):
        model = getattr(pipeline, part, None)
        layers = (
            [layer for layer, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)] if model else []
        )
        assert {layer: kohya.dotted(layer.replace(".", "_")) for layer in layers} == dict(zip(layers, layers, strict=True))


def test_layer_names_of_sdxl_round_trip(real):  # noqa: F811
    for part, model in real.items():
        layers = [layer for layer, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
        wrong = [layer for layer in layers if kohya.dotted(layer.replace(".", "_")) != layer]
        assert layers and not wrong, part


def test_original_sdxl_names_are_read_as_in_diffusers(real):  # noqa: F811
    inside = ["transformer_blocks_1_attn2_to_k", "proj_in", "transformer_blocks_0_ff_net_0_proj"]
    names = [f"input_blocks_{i}_1_{rest}" for i in (4, 5, 7, 8) for rest in inside]
    names += [f"middle_block_1_{rest}" for rest in inside]
    names += [f"output_blocks_{i}_1_{rest}" for i in range(6) for rest in inside]
    for name in names:
        key = f"lora_unet_{name}.lora_down.weight"
        pair = {key: torch.zeros(1, 1), key.replace("lora_down", "lora_up"): torch.zeros(1, 1)}
        theirs, _ = StableDiffusionXLPipeline.lora_state_dict(pair, unet_config=real["unet"].config)
        assert {re.sub(r"[._]lora[._].*", "", key).replace("processor.", "") for key in theirs} == {f"unet.{kohya.dotted(name)}"}
        assert kohya.dotted(name).startswith(("down_blocks.", "mid_block.", "up_blocks."))
        assert kohya.dotted(name) in dict(real["unet"].named_modules())
