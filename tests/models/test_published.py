"""The published sizes of every family, on the meta device: parameters, adapted layers, and what a LoRA of rank 16 holds.

The README's table of models is `python tests/models/test_published.py`."""

from __future__ import annotations

from typing import Any

import diffusers as D
import pytest
import torch
from torch import nn

from dreambooth_lab.adapter.base import match
from dreambooth_lab.models.chroma import Chroma
from dreambooth_lab.models.deepfloyd import DeepFloyd1
from dreambooth_lab.models.flux import Flux
from dreambooth_lab.models.flux2_klein import Flux2Klein
from dreambooth_lab.models.qwen_image import QwenImage
from dreambooth_lab.models.sd import StableDiffusion
from dreambooth_lab.models.sd3 import StableDiffusion3
from dreambooth_lab.models.sdxl import SDXL
from dreambooth_lab.models.sdxl_refiner import SDXLRefiner
from dreambooth_lab.models.z_image import ZImage

CROSS = ["CrossAttnDownBlock2D"] * 2
SD: dict[str, Any] = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
XL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", *CROSS],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
}
REFINER = XL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", *CROSS, "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
}
IF: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 6,
    "block_out_channels": [192, 384, 576, 768],
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "cross_attention_dim": 768,
    "encoder_hid_dim": 4096,
    "resnet_time_scale_shift": "scale_shift",
    "layers_per_block": 3,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
}
MM: dict[str, Any] = {"attention_head_dim": 64, "pos_embed_max_size": 192}
KLEIN: dict[str, Any] = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
V21 = SD | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
LARGE = MM | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}

# model= → its family, denoiser, settings as published, parameters in billions as published
PUBLISHED: dict[str, tuple[Any, Any, dict[str, Any], float]] = {
    "sd15": (StableDiffusion, D.UNet2DConditionModel, SD, 0.860),
    "sd21": (StableDiffusion, D.UNet2DConditionModel, V21, 0.866),
    "sdxl": (SDXL, D.UNet2DConditionModel, XL, 2.567),
    "sdxl_refiner": (SDXLRefiner, D.UNet2DConditionModel, REFINER, 2.261),
    "sd3": (
        StableDiffusion3,
        D.SD3Transformer2DModel,
        MM | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
        2.03,
    ),
    "sd35_large": (StableDiffusion3, D.SD3Transformer2DModel, LARGE, 8.06),
    "flux": (Flux, D.FluxTransformer2DModel, {"guidance_embeds": True}, 11.90),
    "flux_schnell": (Flux, D.FluxTransformer2DModel, {}, 11.89),
    "deepfloyd_1": (DeepFloyd1, D.UNet2DConditionModel, IF, 0.37),
    "flux2_klein": (Flux2Klein, D.Flux2Transformer2DModel, KLEIN, 3.88),
    "z_image": (ZImage, D.ZImageTransformer2DModel, {}, 6.15),
    "qwen_image": (QwenImage, D.QwenImageTransformer2DModel, {}, 20.43),
    "chroma": (Chroma, D.ChromaTransformer2DModel, {}, 8.90),
}


class Sizes:
    """A family's published denoiser, counted."""

    def __init__(self, name: str):
        family, kind, settings, self.published = PUBLISHED[name]
        with torch.device("meta"):
            model = kind(**settings)
        self.parameters = sum(p.numel() for p in model.parameters())
        parts = [ending for group in ("attention", "feed_forward") for ending in family.learns.get(group, ())]
        self.layers = match(model, parts)
        self.lora = sum(16 * _sides(model.get_submodule(layer)) for layer in self.layers)
        within = {
            n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(part.isdigit() for part in n.split("."))
        }
        self.covered = sum(model.get_submodule(n).weight.numel() for n in within & set(self.layers))
        self.linear = sum(model.get_submodule(n).weight.numel() for n in within)


def _sides(layer: Any) -> int:
    return layer.weight.shape[0] + layer.weight[0].numel()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published_and_most_weights_of_blocks_learn(name):
    sizes = Sizes(name)
    assert sizes.parameters / 1e9 == pytest.approx(sizes.published, rel=0.01)
    assert sizes.layers and sizes.covered > (0.5 if name == "deepfloyd_1" else 0.6) * sizes.linear


if __name__ == "__main__":
    print("| model= | denoiser, B parameters | adapted layers | LoRA of rank 16, M parameters |\n|---|---|---|---|")
    for name in PUBLISHED:
        sizes = Sizes(name)
        print(f"| `{name}` | {sizes.parameters / 1e9:.2f} | {len(sizes.layers)} | {sizes.lora / 1e6:.1f} |")
