"""Exported layer names against the names that ComfyUI accepts, derived from its rules."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from test_matrix import compose, learned
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfyui import text_names, unet_names
from dreambooth_lab.adapter import kohya, matching_layers
from dreambooth_lab.adapter.peft_layout import saved_name
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family, build_trainable_text
from dreambooth_lab.models.sdxl import SDXL

ENDS = {"lora_up.weight", "lora_down.weight", "alpha"}


@pytest.fixture(scope="module")
def real():
    """SDXL's architecture at its own size, without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=2048,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
        second = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
        return {"unet": unet, "text_encoder": first, "text_encoder_2": CLIPTextModelWithProjection(second)}


def test_trained_sdxl_layers_have_names_known_to_comfyui(real):
    expected = unet_names((0, 2, 10), 10, 2) | text_names("te1", 12) | text_names("te2", 32)
    written: set[str] = set()
    for part, model in real.items():
        target_modules = SDXL.target_modules if part == "unet" else SDXL.text_target_modules
        layers = matching_layers(model, [ending for endings in target_modules.values() for ending in endings])
        layers = [layer if part == "unet" else saved_name(layer) for layer in layers]
        one = {f"{layer}.lora_{which}.weight": torch.zeros(1) for layer in layers for which in "AB"}
        names = kohya.convert(SDXL.kohya[part], one, dict.fromkeys(layers, 1.0), 1.0)
        assert len(names) == 3 * len(layers), "no two layers share a name"
        written |= {name.partition(".")[0] for name in names}
    assert written <= expected
    heads = [name for name in written if "to_q" in name or "q_proj" in name]
    assert len(heads) == 2 * 70 + 12 + 32, "SDXL has 70 transformer blocks with two attentions each"


def test_written_file_has_these_names_with_alphas(tiny_sdxl, tmp_path):
    cfg = compose(tiny_sdxl, "lora")
    cfg.adapter.text_encoders, cfg.adapter.parts = [1, 2], ["attention", "feed_forward", "convolution"]
    family, adapter = build_family(cfg), build_adapter(cfg)
    text = build_trainable_text(cfg, family)
    attach(cfg, family, adapter, text)
    adapter.export(tmp_path, learned(DreamBooth(cfg, family, adapter, text)))
    keys = load_file(tmp_path / "kohya.safetensors")
    named = {key.partition(".")[0] for key in keys}
    assert named <= unet_names((0, 1), 1, 1) | text_names("te1", 2) | text_names("te2", 2) and len(named) > 40
    assert {key.partition(".")[2] for key in keys} == ENDS and len(keys) == 3 * len(named)
    ranks = {keys[f"{name}.alpha"].item() for name in named} | {keys[f"{name}.lora_down.weight"].shape[0] for name in named}
    assert ranks == {4}, "the scale is in the up weights"
