"""How other programs read a LoRA file, restated from their rules: which keys they read, and where they list it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from comfyui import BLOCK, JOINT, flux_names, sd3_names, unet_names

ORIGINAL = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection"}
Sizes = tuple[tuple[int, ...], int, int]  # of a UNet, as `comfyui.unet_names` takes them
UNETS: dict[str, Sizes] = {
    "sd15": ((1, 1, 1, 0), 1, 2),
    "sd21": ((1, 1, 1, 0), 1, 2),
    "sdxl": ((0, 2, 10), 10, 2),
    "sdxl_refiner": ((0, 4, 4, 0), 4, 2),
}


def original_names(depths: tuple[int, ...], middle: int, resnets: int) -> set[str]:
    """A UNet's layers as Stable Diffusion's own code names them, dots as underscores."""
    names = {"input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"}

    def place(where: str, depth: int) -> None:
        names.update(f"{where}_0_{part}" for part in ORIGINAL.values())
        attention(f"{where}_1", depth)

    def attention(where: str, depth: int) -> None:
        inside = [f"transformer_blocks_{t}_{part}" for t in range(depth) for part in BLOCK]
        names.update(f"{where}_{part}" for part in (("proj_in", "proj_out", *inside) if depth else ()))

    last = len(depths) - 1
    for i, (down, up) in enumerate(zip(depths, reversed(depths), strict=True)):
        for j in range(resnets):
            place(f"input_blocks_{i * (resnets + 1) + j + 1}", down)
        for j in range(resnets + 1):
            place(f"output_blocks_{i * (resnets + 1) + j}", up)
        if i < last:
            names.add(f"input_blocks_{(i + 1) * (resnets + 1)}_0_op")
            names.add(f"output_blocks_{i * (resnets + 1) + resnets}_{2 if up else 1}_conv")
    for j in (0, 2):
        names.update(f"middle_block_{j}_{part}" for part in ORIGINAL.values())
    attention("middle_block_1", middle)
    return names


def a1111(name: str) -> str:
    """A1111's conversion of a layer's name in a file: Stable Diffusion's name without `diffusion_model`."""
    layer = name.removeprefix("lora_unet_")
    if found := re.fullmatch(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", layer):
        block, place, rest = int(found[2]), int(found[4]), found[5]
        at = 3 * block + place + (found[1] == "down")
        inside = rest if found[3] == "attentions" else ORIGINAL.get(rest, rest)
        return f"{'input' if found[1] == 'down' else 'output'}_blocks_{at}_{int(found[3] == 'attentions')}_{inside}"
    if found := re.fullmatch(r"mid_block_(attentions|resnets)_(\d+)_(.+)", layer):
        attention = found[1] == "attentions"
        return (
            f"middle_block_{1 if attention else 2 * int(found[2])}_{found[3] if attention else ORIGINAL.get(found[3], found[3])}"
        )
    if found := re.fullmatch(r"down_blocks_(\d+)_downsamplers_0_conv", layer):
        return f"input_blocks_{3 + 3 * int(found[1])}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d+)_upsamplers_0_conv", layer):
        return f"output_blocks_{2 + 3 * int(found[1])}_{2 if int(found[1]) else 1}_conv"
    return layer


def dotted(part: str) -> str:
    return "to_out.0" if part == "to_out_0" else part


def blocks(places: Mapping[str, int], parts: Iterable[str]) -> set[str]:
    """`transformer.` keys: the name of a list of blocks → how many, and the layers of each."""
    return {f"transformer.{place}.{i}.{part}" for place, count in places.items() for i in range(count) for part in parts}


TWO_STREAMS = [f"attn.{part}" for part in map(dotted, JOINT)]
FLUX2 = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
QWEN = [f"{mlp}.net.{end}" for mlp in ("img_mlp", "txt_mlp") for end in ("0.proj", "2")]
Z_IMAGE = [f"attention.{part}" for part in map(dotted, JOINT[:4])] + [f"feed_forward.w{i}" for i in (1, 2, 3)]
COMFYUI: dict[str, set[str]] = {  # the accepted names, of full-size models
    **{name: unet_names(*sizes) for name, sizes in UNETS.items()},
    "sd3": sd3_names(24),
    "sd35_medium": sd3_names(24, dual=13),
    "sd35_large": sd3_names(38),
    "flux": flux_names(19, 38),
    "flux_schnell": flux_names(19, 38),
    "chroma": flux_names(19, 38),
    "qwen_image": blocks({"transformer_blocks": 60}, TWO_STREAMS + QWEN),
    "z_image": blocks({"layers": 30, "context_refiner": 2, "noise_refiner": 2}, Z_IMAGE),
    "flux2_klein": blocks({"transformer_blocks": 5}, [*TWO_STREAMS, *FLUX2])
    | blocks({"single_transformer_blocks": 20}, ["attn.to_qkv_mlp_proj", "attn.to_out"]),
}
INVOKE = {  # its regular expressions; for SDXL it accepts diffusers' names or the original ones, but not both together
    "sd15": r"lora_(unet|te)_.*", "sd21": r"lora_(unet|te)_.*",
    "sdxl": r"lora_unet_(?!input_blocks|middle_block|output_blocks).*|lora_te[12]_.*",
    "flux": r"lora_transformer_(single_transformer_blocks|transformer_blocks)_\d+_\w+|lora_te1_text_model_encoder_layers_\d+_.*",
    "qwen_image": r"transformer\.transformer_blocks\.\d+\.(attn|img_mlp|txt_mlp)\..*",
    "z_image": r"transformer\.(layers|context_refiner|noise_refiner)\.\d+\..*",
    "flux2_klein": r"transformer\.(single_)?transformer_blocks\.\d+\.(attn|ff|ff_context)\..*",
}  # fmt: skip
INVOKE["flux_schnell"] = INVOKE["flux"]


def _a1111_unread(name: str, keys: set[str]) -> set[str]:
    known = original_names(*UNETS[name])
    return {key for key in keys if a1111(key) not in known}


def _comfyui_unread(name: str, keys: set[str]) -> set[str]:
    return keys - COMFYUI[name]


def _invoke_unread(name: str, keys: set[str]) -> set[str]:
    return {key for key in keys if not re.fullmatch(INVOKE[name], key)}


UNREAD: dict[str, Callable[[str, set[str]], set[str]]] = {  # program → the names of a model that it does not read
    "ComfyUI": _comfyui_unread,
    "Forge": _comfyui_unread,  # a copy of ComfyUI's tables
    "sd-scripts": _comfyui_unread,  # diffusers' names, which it converts to SDXL's original names
    "A1111": _a1111_unread,
    "InvokeAI": _invoke_unread,
}


def a1111_version(header: Mapping[str, str]) -> str:
    """The base models under which A1111 lists a file."""
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if header.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if header else "Unknown"


def forge_version(header: Mapping[str, str]) -> str:
    """The base models under which Forge lists a file."""
    architecture = header.get("modelspec.architecture", "")
    if "black-forest-labs/flux" in header.get("modelspec.implementation", "") or architecture == "flux-1-dev/lora":
        return "Flux"
    if architecture == "stable-diffusion-xl-v1-base/lora" or header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if header.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if architecture == "stable-diffusion-v1/lora" else "Unknown"
