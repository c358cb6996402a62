"""Find and load the files of a pretrained model. Only safetensors files are read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..config import ConfigError
from ..heap import trim as trim
from . import hub

WAY_OUT = "set model.pretrained to a folder written by diffusers' save_pretrained, or to a reachable hub id"


def resolve(pretrained: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a diffusers pipeline: a local one, or a hub id in the hub's cache.

    Raises:
        ConfigError: there is no such folder, or it is neither in the cache nor on the hub.
    """
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        folder = hub.folder(pretrained, revision, variant, WAY_OUT)
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"model.pretrained is {pretrained!r}, which has no model_index.json; {WAY_OUT}")
    return folder


def cache_first(load: Callable[..., Any], name: str | None, **options: Any) -> Any:
    """Load by name from the hub's cache; from the network only if it is not cached."""
    try:
        return load(name, local_files_only=True, **options)
    except (OSError, ValueError):
        return load(name, **options)


IGNORED_WARNINGS = (
    "torchvision",
    "No LoRA keys associated to",
)  # torchvision is not needed here; most LoRAs don't adapt text encoders


def silence_loading() -> None:
    """Silence the libraries' loading bars, and their warnings that do not apply here."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    for library in ("transformers", "diffusers"):
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(_applies)  # a handler has the same filter once


def _applies(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in IGNORED_WARNINGS)


def on_meta(kind: Any, folder: Path) -> nn.Module:
    """A component's architecture without weights, on the meta device."""
    with torch.device("meta"):
        if kind.__module__.startswith("diffusers"):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels in [-1, 1] [B 3 H W] → images, by diffusers' image processor."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor().postprocess(pixels, output_type="pil")


def to_pixels(picture: Image.Image, height: int, width: int) -> Tensor:
    """An image, cropped to fit, as pixels in [-1, 1] [1 3 H W]."""
    fitted = ImageOps.fit(picture.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1


def freeze_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A frozen model in evaluation mode, on its device, with every tensor copied to its own memory.

    Memory-mapped weights of a safetensors file may be unaligned. Kernels then round differently in the last bit than with
    allocated weights, so the copy is necessary for bit-identical loads.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, copy=True)
    return model.to(device).requires_grad_(False).eval()
