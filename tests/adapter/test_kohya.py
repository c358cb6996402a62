"""The names that ComfyUI looks for in a LoRA, made from its rules, against those that we write."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from test_matrix import compose, learned
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreambooth_lab.adapter import kohya, match
from dreambooth_lab.adapter.lora import _saved
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.models.sdxl import SDXL
from dreambooth_lab.run import attach, build_adapter, build_family, build_text

RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
BLOCK = [f"attn{i}_to_{end}" for i in (1, 2) for end in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
CLIP = ("mlp_fc1", "mlp_fc2", "self_attn_k_proj", "self_attn_q_proj", "self_attn_v_proj", "self_attn_out_proj")
ENDS = {"lora_up.weight", "lora_down.weight", "alpha"}


def unet_names(depths: tuple[int, ...], resnets: int) -> set[str]:
    """ComfyUI maps its own modules to diffusers' names of blocks, dots as underscores, behind `lora_unet_`.

    Args:
        depths: transformer blocks of each attention, down block by down block; the middle has the last.
    """
    names = {"conv_in", "conv_out", *(f"{part}_embedding_linear_{i}" for part in ("time", "add") for i in (1, 2))}

    def place(where: str, count: int, depth: int) -> None:
        for i in range(count):
            names.update(f"{where}_resnets_{i}_{part}" for part in RESNET)
            if depth and not (where == "mid_block" and i):
                inside = [f"transformer_blocks_{t}_{part}" for t in range(depth) for part in BLOCK]
                names.update(f"{where}_attentions_{i}_{part}" for part in ("proj_in", "proj_out", *inside))

    for i, depth in enumerate(depths):
        place(f"down_blocks_{i}", resnets, depth)
        place(f"up_blocks_{len(depths) - 1 - i}", resnets + 1, depth)
        names |= {f"down_blocks_{i}_downsamplers_0_conv", f"up_blocks_{i}_upsamplers_0_conv"}
    place("mid_block", 2, depths[-1])
    return {f"lora_unet_{name}" for name in names}


def text_names(layers: tuple[int, int]) -> set[str]:
    return {
        f"lora_te{i}_text_model_encoder_layers_{layer}_{part}"
        for i, count in enumerate(layers, 1)
        for layer in range(count)
        for part in CLIP
    }


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


def test_every_layer_of_sdxl_that_learns_has_a_name_comfyui_knows(real):
    expected = unet_names((0, 2, 10), 2) | text_names((12, 32))
    written: set[str] = set()
    for part, model in real.items():
        learns = SDXL.learns if part == "unet" else SDXL.text_learns
        layers = match(model, [ending for endings in learns.values() for ending in endings])
        layers = [layer if part == "unet" else _saved(layer) for layer in layers]
        one = {f"{layer}.lora_{which}.weight": torch.zeros(1) for layer in layers for which in "AB"}
        names = kohya.convert(SDXL.kohya[part], one, dict.fromkeys(layers, 1.0))
        assert len(names) == 3 * len(layers), "no two layers share a name"
        written |= {name.partition(".")[0] for name in names}
    assert written <= expected
    heads = [name for name in written if "to_q" in name or "q_proj" in name]
    assert len(heads) == 2 * 70 + 12 + 32, "SDXL has 70 transformer blocks with two attentions each"


def test_what_is_written_are_these_names_and_each_has_its_alpha(tiny_sdxl, tmp_path):
    cfg = compose(tiny_sdxl, "lora")
    cfg.adapter.text_encoders, cfg.adapter.parts = [1, 2], ["attention", "feed_forward", "convolution"]
    family, adapter = build_family(cfg), build_adapter(cfg)
    text = build_text(cfg, family)
    attach(cfg, family, adapter, text)
    adapter.export(tmp_path, learned(DreamBooth(cfg, family, adapter, text)))
    keys = load_file(tmp_path / "kohya.safetensors")
    named = {key.partition(".")[0] for key in keys}
    assert named <= unet_names((0, 1), 1) | text_names((2, 2)) and len(named) > 40
    assert {key.partition(".")[2] for key in keys} == ENDS and len(keys) == 3 * len(named)
    assert all(keys[f"{name}.alpha"] == 3 and keys[f"{name}.lora_down.weight"].shape[0] == 4 for name in named)
