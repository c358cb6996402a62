"""Read LoRA files in any layout: diffusers', kohya's sd-scripts', peft's folders, ai-toolkit's and ComfyUI's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import ConfigError
from . import kohya
from .factors import Factors

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CLIP = "text_model."  # prefix of CLIP's layer names in files; transformers 5 removed it from one class
PREFIXES = {
    "lora_unet": "unet", "lora_transformer": "transformer", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2",
    "lora_te": "text_encoder", "lycoris": "unet",
}  # fmt: skip
SAID = "lora_adapter_metadata"  # the header field with peft's settings in diffusers' files
ENDS = {
    "lora_A": "down", "lora_B": "up", "lora.down": "down", "lora.up": "up", "lora_down": "down", "lora_up": "up",
    "lora_linear_layer.down": "down", "lora_linear_layer.up": "up",
}  # fmt: skip
KEY = re.compile(rf"(?P<layer>.+?)[._](?P<end>{'|'.join(map(re.escape, ENDS))})(\.default)?\.weight")
OTHERS = {
    "lora_magnitude_vector": "a DoRA", "dora_scale": "a DoRA", "hada_": "a LoHa", "lokr_": "a LoKr", "oft_": "an OFT",
    "lora_mid": "a LoCon with a Tucker core", "lora_B.bias": "a LoRA with biases", "lora_embedding": "a LoRA on embeddings",
}  # fmt: skip


class File(NamedTuple):
    """A LoRA's file."""

    layout: str  # diffusers, kohya, peft or comfyui
    parts: dict[str, dict[str, Factors]]  # part of a pipeline → layer, named as in diffusers' files → its update
    header: dict[str, str]
    assumed: int  # number of layers without alpha, where alpha is the rank


def read(path: Path) -> File:
    """A file, a peft folder (text encoders in folders within), or the folder of an export.

    Raises:
        ConfigError: it is not a LoRA in safetensors.
    """
    if not path.exists():
        raise ConfigError(f"{str(path)!r} does not exist; give the path of a LoRA")
    if not path.is_dir():
        return _peft([path.parent]) if path.name == PEFT_FILE else _file(path)
    if (path / PEFT_FILE).is_file():
        return _peft([path, *sorted(file.parent for file in path.glob(f"*/{PEFT_FILE}"))])
    if (path / DIFFUSERS_FILE).is_file():
        return _file(path / DIFFUSERS_FILE)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _file(files[0])
    raise ConfigError(
        f"{str(path)!r} holds {len(files)} safetensors files and no {PEFT_FILE} or {DIFFUSERS_FILE}; give the path of one file"
    )


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as plain:
        begins = plain.read(2)
    if begins == b"PK" or begins[:1] == b"\x80":
        raise ConfigError(f"{str(path)!r} is a pickle, which can run code when it is read; ask its maker for safetensors")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{str(path)!r} is no safetensors file: {error}") from error


def _file(path: Path) -> File:
    tensors, header = _open(path)
    layout = _layout(tensors)
    pairs, alphas = _pairs(tensors, path)
    settings = _settings(header)
    parts: dict[str, dict[str, Factors]] = {}
    assumed = 0
    for key, pair in pairs.items():
        part, layer = _place(key, layout)
        alpha = alphas.get(key)
        if alpha is None:
            alpha = _alpha(settings.get(part, {}), layer, pair["down"].shape[0])
            assumed += part not in settings
        parts.setdefault(part, {})[layer] = Factors(pair["down"], pair["up"], alpha)
    return File(layout, parts, header, assumed)


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Layer, by its name in the file → its two factors, and → its alpha."""
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if other := next((name for mark, name in OTHERS.items() if mark in key), None):
            raise ConfigError(f"{str(path)!r} is {other} ({key}); these tools read only plain LoRAs, B A with an alpha")
        if key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
        elif found := KEY.fullmatch(key):
            pairs.setdefault(found["layer"], {})[ENDS[found["end"]]] = tensor
        else:
            raise ConfigError(
                f"{str(path)!r} is not a LoRA: it has {key}; give a file whose keys end with lora_A, lora_down or similar"
            )
    lone = [layer for layer, pair in pairs.items() if len(pair) < 2]
    if lone or not pairs:
        raise ConfigError(f"{str(path)!r} is not a complete LoRA: {lone[0] + ' lacks a factor' if lone else 'it is empty'}")
    for layer, pair in pairs.items():
        if pair["down"].shape[0] != pair["up"].shape[1]:
            raise ConfigError(f"{str(path)!r} is damaged: {layer} has ranks {pair['down'].shape[0]} and {pair['up'].shape[1]}")
    return pairs, alphas


def _layout(keys: Mapping[str, Tensor]) -> str:
    first = next(iter(keys), "")
    if first.startswith(tuple(f"{prefix}_" for prefix in PREFIXES)):
        return "kohya"
    return {"diffusion_model": "comfyui", "base_model": "peft"}.get(first.partition(".")[0], "diffusers")


def _place(key: str, layout: str) -> tuple[str, str]:
    """A layer's name in a file → its part and its name there."""
    if layout == "kohya":
        prefix = next((prefix for prefix in PREFIXES if key.startswith(f"{prefix}_")), None)
        if prefix is None:
            raise ConfigError(f"{key} starts with none of {sorted(PREFIXES)}, the parts of kohya's layout")
        name = key.removeprefix(f"{prefix}_")
        return denoiser(name) if PREFIXES[prefix] == "unet" else PREFIXES[prefix], kohya.dotted(name)
    part, _, layer = key.partition(".")
    part = "transformer" if layout == "comfyui" else part
    if part.startswith("text_encoder"):
        return part, text_name(layer)
    return part, re.sub(r"\.processor\.(to_\w+)$", _processed, layer)


def _processed(found: re.Match[str]) -> str:
    """Convert the attention layer names of diffusers' older files."""
    return ".to_out.0" if found[1] == "to_out" else f".{found[1]}"


def denoiser(layer: str) -> str:
    """The pipeline's name of the denoiser that has a layer."""
    return (
        "unet"
        if re.match(r"(down|up|input|output|middle|mid)_block|conv_|time_emb|add_emb|label_|out_", layer)
        else "transformer"
    )


def block_of(layer: str) -> str:
    """A layer's name up to its first number: `down_blocks.1`, `text_model.encoder.layers.0`; else its first word."""
    found = re.match(r"(.*?\.\d+)(\.|$)", layer)
    return found[1] if found else layer.partition(".")[0]


def text_name(layer: str) -> str:
    """The name of a CLIP layer in files; its class lost `text_model` in transformers 5."""
    return f"{CLIP}{layer}" if layer.startswith("encoder.layers.") else layer


def _settings(header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Part → peft's settings, as diffusers writes them into a header."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(header.get(SAID, "{}")).items():
        part, _, setting = key.partition(".")
        found.setdefault(part, {})[setting] = value
    return found


def _alpha(values: Mapping[str, Any], layer: str, rank: int) -> float:
    """The alpha of a layer's scale, by peft's settings."""
    from peft.utils.other import get_pattern_key

    patterns = values.get("alpha_pattern") or {}
    alphas = dict(patterns) | {f"{CLIP}{key}": value for key, value in patterns.items()}
    alpha = float(alphas.get(get_pattern_key(list(alphas), layer), values.get("lora_alpha", rank)))
    return alpha * rank**0.5 if values.get("use_rslora") else alpha


def _peft(folders: list[Path]) -> File:
    """Read the denoiser's folder, or a text encoder's, and subfolders."""
    parts: dict[str, dict[str, Factors]] = {}
    header: dict[str, str] = {}
    assumed = 0
    for folder in folders:
        tensors, own = _open(folder / PEFT_FILE)
        header |= own
        known = (folder / PEFT_CONFIG).is_file()
        values = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8")) if known else {}
        pairs, alphas = _pairs(
            {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}, folder / PEFT_FILE
        )
        for layer, pair in pairs.items():
            name = text_name(layer)
            part = folder.name if folder.name.startswith("text_encoder") else "text_encoder"
            part = part if name.startswith(CLIP) else denoiser(name)
            alpha = alphas.get(layer)
            assumed += alpha is None and not known
            alpha = _alpha(values, layer, pair["down"].shape[0]) if alpha is None else alpha
            parts.setdefault(part, {})[name] = Factors(pair["down"], pair["up"], alpha)
    return File("peft", parts, header, assumed)
