"""The published settings of the families' denoisers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers as D

import tiny
import tiny_families

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

MEDIUM = MM | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}

# model= → its denoiser, settings as published, parameters in billions as published
PUBLISHED: dict[str, tuple[Any, dict[str, Any], float]] = {
    "sd15": (D.UNet2DConditionModel, SD, 0.860),
    "sd21": (D.UNet2DConditionModel, V21, 0.866),
    "sdxl": (D.UNet2DConditionModel, XL, 2.567),
    "sdxl_refiner": (D.UNet2DConditionModel, REFINER, 2.261),
    "sd3": (
        D.SD3Transformer2DModel,
        MM | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
        2.03,
    ),
    "sd35_large": (D.SD3Transformer2DModel, LARGE, 8.06),
    "flux": (D.FluxTransformer2DModel, {"guidance_embeds": True}, 11.90),
    "flux_schnell": (D.FluxTransformer2DModel, {}, 11.89),
    "deepfloyd_1": (D.UNet2DConditionModel, IF, 0.37),
    "flux2_klein": (D.Flux2Transformer2DModel, KLEIN, 3.88),
    "z_image": (D.ZImageTransformer2DModel, {}, 6.15),
    "qwen_image": (D.QwenImageTransformer2DModel, {}, 20.43),
    "chroma": (D.ChromaTransformer2DModel, {}, 8.90),
    "lumina2": (D.Lumina2Transformer2DModel, {"cap_feat_dim": 2304}, 2.61),
}


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "projection_dim": 1280}
TEXT: dict[str, dict[str, dict[str, Any]]] = {  # settings of the text encoders that affect the denoiser
    "sd15": {"text_encoder": CLIP_L},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "flux": {"text_encoder": CLIP_L, "text_encoder_2": {"d_model": 4096}},
}


def outline(name: str, folder: Path) -> Path:
    """A checkpoint's folder with the published settings, small text encoders, and no weights."""
    if name == "sdxl":
        tiny.save_sdxl(folder)
    else:
        tiny_families.save(name, folder)
    kind, settings, _ = PUBLISHED[name]
    part = "unet" if (folder / "unet").is_dir() else "transformer"
    (folder / part / "config.json").write_text(json.dumps({"_class_name": kind.__name__, **settings}))
    for encoder, sizes in TEXT[name].items():
        path = folder / encoder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder
