"""Where a pretrained model's files are, and how one becomes a model. Only safetensors are ever read."""

from __future__ import annotations

import logging
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..config import ConfigError
from ..heap import trim as trim

WAY_OUT = "set model.pretrained to a folder written by diffusers' save_pretrained, or to a hub id this machine can reach"


def resolve(pretrained: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a diffusers pipeline: a local one as it is, a hub id through the hub's cache.

    Raises:
        ConfigError: there is no such folder, or the hub or the cache can't give it.
    """
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        folder = _download(pretrained, revision, variant)
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"model.pretrained is {pretrained!r}, which has no model_index.json; {WAY_OUT}")
    return folder


def _download(hub_id: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import constants

    constants.HF_HUB_ETAG_TIMEOUT = min(constants.HF_HUB_ETAG_TIMEOUT, 10)  # seconds until "unreachable"
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id, revision=revision, variant=variant, use_safetensors=True))
    except Exception as error:  # the hub's client raises a dozen kinds
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ConfigError(
            f"model.pretrained is {hub_id!r}, which is no folder and could not be fetched ({type(error).__name__}: "
            f"{shorten(reason, 160)}); {WAY_OUT}"
        ) from error


NOT_NEWS = ("torchvision", "No LoRA keys associated to")  # nothing here needs it; most LoRAs leave text encoders alone


def quiet() -> None:
    """Silence the libraries' loading bars, and what they say of things that are as they should be."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    for library in ("transformers", "diffusers"):
        for handler in logging.getLogger(library).handlers:
            handler.addFilter(lambda record: not any(words in record.getMessage() for words in NOT_NEWS))


def hollow(kind: Any, folder: Path) -> nn.Module:
    """A component's architecture without weights, on the meta device."""
    with torch.device("meta"):
        if kind.__module__.startswith("diffusers"):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))


def pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels in [-1, 1] [B 3 H W] as diffusers' own image processor makes pictures of them."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor().postprocess(pixels, output_type="pil")


def settle(model: nn.Module, device: torch.device) -> nn.Module:
    """Frozen, in evaluation mode, on its device, with every tensor in memory of its own.

    Weights mapped from a safetensors file may start at any byte; kernels then round differently in the last bit from
    weights that were allocated, so the copy is what makes two loads of one model agree exactly.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, copy=True)
    return model.to(device).requires_grad_(False).eval()
