"""The key layout of kohya's sd-scripts. It is written with diffusers' block names, as ComfyUI and A1111 read it. It is read with
these names and with SDXL's original ones, which sd-scripts writes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

WORDS = {
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks", "text_model", "self_attn",
    "cross_attn", "to_q", "to_k", "to_v", "to_out", "to_qkv", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj",
    "q_proj", "k_proj", "v_proj", "out_proj", "proj_in", "proj_out", "proj_mlp", "conv_in", "conv_out", "conv_shortcut",
    "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2", "ff_context", "norm1_context", "norm_out",
    "x_embedder", "context_embedder", "time_text_embed", "timestep_embedder", "text_embedder", "guidance_embedder",
    "img_mlp", "txt_mlp", "img_mod", "txt_mod", "feed_forward", "noise_refiner", "context_refiner", "layers_refiner",
    "to_add_qkv", "norm_q", "norm_k", "img_in", "txt_in", "distilled_guidance_layer", "in_layer", "out_layer", "time_in",
    "double_blocks", "single_blocks", "joint_blocks", "adaLN_modulation", "text_projection", "adaln_single",
    "all_final_layer", "all_x_embedder", "cap_embedder", "caption_embedder", "caption_projection", "class_embedding",
    "conv_depth", "conv_inverted", "conv_point", "double_stream_modulation_img", "double_stream_modulation_txt",
    "encoder_hid_proj", "in_proj", "linear_3", "linear_in", "linear_out", "patch_embed", "pos_embed",
    "single_stream_modulation", "t_embedder", "time_caption_embed", "time_embed", "time_guidance_embed", "to_qkv_mlp_proj",
}  # components of diffusers' and transformers' layer names that contain an underscore  # fmt: skip
LONGEST = max(word.count("_") + 1 for word in WORDS)
RESNET = {
    "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
OUTER = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
MIDDLE = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}
ENDS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def convert(prefix: str, layers: Mapping[str, Tensor], alphas: Mapping[str, float], alpha: float) -> dict[str, Tensor]:
    """peft's keys (`a.b.to_q.lora_A.weight`) → kohya's (`lora_unet_a_b_to_q.lora_down.weight`), an `alpha` for each layer, since
    tools apply alpha / rank. All have the same alpha: diffusers 0.42 assigns differing ones to wrong layers.

    Args:
        prefix: of the model in this layout: lora_unet, lora_te1, …
        alphas: layer → alpha of its factors.
        alpha: the written one; B is scaled accordingly.
    """
    converted = {}
    for key, tensor in layers.items():
        layer, end = next((key.removesuffix("." + end), end) for end in ENDS if key.endswith("." + end))
        name = f"{prefix}_{layer.replace('.', '_')}"
        is_even = alphas[layer] == alpha or end.startswith("lora_A")
        converted[f"{name}.{ENDS[end]}"] = tensor if is_even else tensor * (alphas[layer] / alpha)
        converted[f"{name}.alpha"] = torch.tensor(float(alpha))
    return converted


def header(rank: int, alpha: float) -> dict[str, str]:
    """Header fields that kohya's tools read."""
    return {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}


def dotted(name: str) -> str:
    """A layer's name with dots (`a_b_to_q` → `a.b.to_q`), the original names of Stable Diffusion's blocks as diffusers'."""
    words, found, at = _renamed(name).split("_"), list[str](), 0
    while at < len(words):
        ahead = ("_".join(words[at : at + count]) for count in range(LONGEST, 1, -1))
        word = next((word for word in ahead if word in WORDS), words[at])
        found.append(word)
        at += word.count("_") + 1
    return ".".join(found)


def _renamed(name: str) -> str:
    """`input_blocks_4_1_proj_in` → `down_blocks_1_attentions_0_proj_in`: three places to a block, in SD 1.x, 2.x and SDXL."""
    if name in OUTER:
        return OUTER[name]
    if match := re.fullmatch(r"middle_block_([012])_(.+)", name):
        return f"mid_block_{MIDDLE[match[1]]}_{RESNET.get(match[2], match[2])}"
    if match := re.fullmatch(r"input_blocks_(\d+)_([01])_(.+)", name):
        block, place = divmod(int(match[1]) - 1, 3)
        return f"down_blocks_{block}_{_inside(place, match[2], match[3])}"
    if match := re.fullmatch(r"output_blocks_(\d+)_([012])_(.+)", name):
        block, place = divmod(int(match[1]), 3)
        return f"up_blocks_{block}_{_inside(place, match[2], match[3])}"
    return name


def _inside(place: int, kind: str, rest: str) -> str:
    if rest in ("op", "conv"):
        return "downsamplers_0_conv" if rest == "op" else "upsamplers_0_conv"
    return f"resnets_{place}_{RESNET.get(rest, rest)}" if kind == "0" else f"attentions_{place}_{rest}"
