"""The layer names that ComfyUI accepts in a LoRA file, restated from its rules: it maps its own modules to diffusers' names,
dots as underscores, behind a prefix."""

from __future__ import annotations

RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
BLOCK = [f"attn{i}_to_{end}" for i in (1, 2) for end in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
CLIP = ("mlp_fc1", "mlp_fc2", "self_attn_k_proj", "self_attn_q_proj", "self_attn_v_proj", "self_attn_out_proj")
JOINT = ("to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED = ("ff_net_0_proj", "ff_net_2", "ff_context_net_0_proj", "ff_context_net_2")


def unet_names(depths: tuple[int, ...], middle: int, resnets: int) -> set[str]:
    """Names of SD 1.x, 2.x, SDXL and its refiner.

    Args:
        depths: transformer blocks of each attention, down block by down block.
        middle: and of the middle block's.
        resnets: of a down block.
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
    place("mid_block", 2, middle)
    return {f"lora_unet_{name}" for name in names}


def text_names(prefix: str, layers: int) -> set[str]:
    """Names of a CLIP text encoder: `te` where a model has one, `te1` and `te2` where it has two."""
    return {f"lora_{prefix}_text_model_encoder_layers_{layer}_{part}" for layer in range(layers) for part in CLIP}


def sd3_names(blocks: int, dual: int = 0) -> set[str]:
    """Names of SD3 and 3.5: `blocks` joint blocks, the first `dual` of them with a second attention."""
    names = {f"{i}_attn_{part}" for i in range(blocks) for part in JOINT}
    names |= {f"{i}_{part}" for i in range(blocks) for part in FEED}
    names |= {f"{i}_attn2_{part}" for i in range(dual) for part in JOINT[:4]}
    return {f"lora_transformer_transformer_blocks_{name}" for name in names}


def flux_names(double: int, single: int) -> set[str]:
    """Names of FLUX.1 and Chroma."""
    alone = ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp", "proj_out")
    return sd3_names(double) | {f"lora_transformer_single_transformer_blocks_{i}_{part}" for i in range(single) for part in alone}
