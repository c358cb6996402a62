"""Weights and settings of LoRA and DoRA in peft's and diffusers' key layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from .base import Form, rounded
from .files import CLIP, PEFT_CONFIG, PEFT_FILE

NAME = "default"  # the one adapter of a run, as diffusers' loader calls it
LENGTHS = ".lora_magnitude_vector"  # DoRA's; transformers expects the name of the parameter in them


def saved_name(name: str) -> str:
    """The name of a text encoder's layer or parameter in diffusers' files, for any version of transformers."""
    name = name + ".weight" if name.endswith(LENGTHS) else name
    return name if name.startswith(CLIP) else CLIP + name


def live_name(name: str, model: nn.Module) -> str:
    """The inverse: the name in this model."""
    name = name.removesuffix(".weight") if name.endswith(LENGTHS + ".weight") else name
    has = any(own.startswith(CLIP) for own, _ in model.named_modules())
    return name if has else name.removeprefix(CLIP)


def layers(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the adapter, by the model's parameter names, in peft's key layout, on the CPU."""
    from peft import get_peft_model_state_dict

    kept = get_peft_model_state_dict(model, state_dict=dict(weights), adapter_name=NAME)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}


def metadata(model: Any) -> dict[str, Any]:
    """Rank, alpha and targets in peft's format; without them a loader assumes alpha = rank."""
    return {key: sorted(v) if isinstance(v, set) else v for key, v in model.peft_config[NAME].to_dict().items()}


def save(path: Path, tensors: Mapping[str, Tensor], form: Form, header: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(rounded(tensors, form.dtype, path.name), path, dict(header))


def with_part(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Keys prefixed with their part, as in diffusers."""
    return {f"{part}.{name}": tensor for part, layers in parts.items() for name, tensor in layers.items()}


def with_saved_names(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {saved_name(name): tensor for name, tensor in layers.items()}


def write(
    folder: Path, layers: Mapping[str, Tensor], values: Mapping[str, Any], form: Form, header: Mapping[str, str]
) -> None:  # fmt: skip
    save(folder / PEFT_FILE, {f"base_model.model.{name}": tensor for name, tensor in layers.items()}, form, header)
    (folder / PEFT_CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def scales(model: nn.Module) -> dict[str, float]:
    """Layer → the factor of its update B A, with any option (rslora …)."""
    from peft.tuners.lora import LoraLayer

    return {name: layer.scaling[NAME] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
