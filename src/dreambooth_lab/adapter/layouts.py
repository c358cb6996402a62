"""Write LoRAs in the layouts of other programs, with the scale folded into B, so that every reader uses the same scale."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import ConfigError
from ..storage.durable import atomic_file, atomic_folder
from . import kohya
from .factors import Factors, Parts, folded
from .files import CLIP, PEFT_CONFIG, PEFT_FILE, SAID

DERIVED = (
    SAID,
    "weights_sha256",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_module",
    "sshs_model_hash",
    "sshs_legacy_hash",
)
FUSED = (
    "double_blocks",
    "single_blocks",
    "joint_blocks",
)  # of the original layouts, where one matrix is several of diffusers' layers
KOHYA = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def write(layout: str, path: Path, parts: Parts, header: Mapping[str, str], dtype: torch.dtype | None = None) -> None:
    """Write a LoRA.

    Args:
        layout: diffusers, kohya (each a file) or peft (a folder).
        parts: names as from `files.read`.
        header: of the original file; outdated fields are removed.
        dtype: None: each tensor's own.

    Raises:
        ConfigError: the layout has no name for a layer.
    """
    _check(layout, parts)
    ready = {part: {name: _cast(folded(layer), layer, dtype) for name, layer in layers.items()} for part, layers in parts.items()}
    plain = {"format": "pt"} | {key: value for key, value in header.items() if key not in DERIVED}
    if layout == "peft":
        _write_peft(path, ready, plain)
        return
    tensors, more = _diffusers(ready) if layout == "diffusers" else _kohya(ready)
    with atomic_file(path) as aside:
        save_file(tensors, aside, plain | more)


def diffusers_weights(parts: Parts) -> dict[str, Tensor]:
    """The input of a diffusers pipeline's `load_lora_weights`, float32."""
    _check("diffusers", parts)
    ready = {
        part: {name: _cast(folded(layer), layer, torch.float32) for name, layer in own.items()} for part, own in parts.items()
    }
    return _diffusers(ready)[0]


def refuse_fused(parts: Parts) -> None:
    """Raise a ConfigError for a file whose layers each correspond to several of diffusers', as sd-scripts writes FLUX."""
    for part, layers in parts.items():
        if fused := next((name for name in layers if name.startswith(FUSED)), None):
            raise ConfigError(
                f"{part} has the layer {fused} of the original model, which is several layers in diffusers; load the file "
                "with diffusers' load_lora_weights and write it with save_lora_weights first"
            )


def _check(layout: str, parts: Parts) -> None:
    refuse_fused(parts)
    for part in parts:
        if layout == "kohya" and part not in KOHYA:
            raise ConfigError(f"kohya's layout has no name for {part!r}, only for {sorted(KOHYA)}; write diffusers or peft")


def _cast(layer: Factors, before: Factors, dtype: torch.dtype | None) -> Factors:
    down, up = layer.down.to(dtype or before.down.dtype), layer.up.to(dtype or before.up.dtype)
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ConfigError(
            f"--dtype {str(down.dtype).removeprefix('torch.')}: a layer's values don't fit in it; use bfloat16 or float32"
        )
    return Factors(down.contiguous(), up.contiguous(), layer.alpha)


def _diffusers(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {f"{part}.{key}": tensor for part, layers in parts.items() for key, tensor in _keys(layers).items()}
    values = {f"{part}.{key}": value for part, layers in parts.items() for key, value in _settings(layers).items()}
    return tensors, {SAID: json.dumps(values, sort_keys=True)}


def _kohya(parts: Parts) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One alpha for all layers, the most common rank: diffusers 0.42 assigns differing alphas of this layout to wrong layers."""
    tensors: dict[str, Tensor] = {}
    rank = _common({(part, name): layer for part, layers in parts.items() for name, layer in layers.items()})
    alone = "unet" in parts and "text_encoder_2" not in parts and not _is_large(parts["unet"])
    for part, layers in parts.items():
        prefix = "lora_te" if part == "text_encoder" and alone else KOHYA[part]
        even = {name: layer._replace(up=layer.up * (layer.rank / rank)) for name, layer in layers.items()}
        tensors |= kohya.convert(prefix, _keys(even), dict.fromkeys(layers, rank), rank)
    return tensors, kohya.header(rank, rank)


def _is_large(unet: Mapping[str, Factors]) -> bool:
    """Whether it is SDXL's, with text encoders `te1` and `te2`: it has several transformer blocks per attention."""
    return any(".transformer_blocks.1." in name for name in unet)


def _keys(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    downs = {f"{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    return downs | {f"{name}.lora_B.weight": layer.up for name, layer in layers.items()}


def _common(layers: Mapping[Any, Factors]) -> int:
    return Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]


def _settings(layers: Mapping[str, Factors]) -> dict[str, Any]:
    """peft's settings. Its patterns match suffixes, so CLIP's names without `text_model` match every version of its classes."""
    rank, layers = _common(layers), {name.removeprefix(CLIP): layer for name, layer in layers.items()}
    others = {name: layer.rank for name, layer in layers.items() if layer.rank != rank}
    return {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(layers)}


def _write_peft(path: Path, parts: Parts, header: Mapping[str, str]) -> None:
    """The denoiser's folder, with text encoders' folders inside; CLIP's names as in transformers 5, that is without
    `text_model` for CLIPTextModel, which SD3's first encoder is not."""
    if (path / "..").resolve() == path.resolve() or (path.exists() and not (path / PEFT_FILE).is_file() and any(path.iterdir())):
        raise ConfigError(f"--output {str(path)!r} is a folder with other contents; choose a new one")
    path.parent.mkdir(parents=True, exist_ok=True)
    bare = not {"transformer", "text_encoder_2"} <= parts.keys()
    with atomic_folder(path) as made:
        for part, layers in parts.items():
            inside = made / part if part.startswith("text_encoder") else made
            short = CLIP if part == "text_encoder" and bare else ""
            named = {name.removeprefix(short): layer for name, layer in layers.items()}
            inside.mkdir(exist_ok=True)
            keys = {f"base_model.model.{key}": tensor for key, tensor in _keys(named).items()}
            save_file(keys, inside / PEFT_FILE, dict(header))
            values = {"peft_type": "LORA"} | _settings(named)
            (inside / PEFT_CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
