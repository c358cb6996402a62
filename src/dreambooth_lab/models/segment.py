"""Segmentation by a text: CLIPSeg (Lüddecke & Ecker 2022), Florence-2 (Xiao et al. 2024); from transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from ..config import ConfigError
from . import files

TASK = "<REFERRING_EXPRESSION_SEGMENTATION>"  # Florence-2's
WAY_OUT = "give a CLIPSeg or Florence-2 folder written by save_pretrained, or a reachable hub id"


class Segmenter(ABC):
    """A network, its preprocessing and a device."""

    kind: ClassVar[str]  # its class in transformers

    def __init__(self, model: Any, processor: Any, device: torch.device):
        self.model: Any = files.freeze_to(model, device)
        self.processor, self.device = processor, device

    @abstractmethod
    def find(self, picture: Image.Image, text: str) -> Tensor:
        """The probability that a pixel shows the object named by the text, [H W] in [0, 1], at the image's size."""


class ClipSeg(Segmenter):
    kind = "CLIPSegForImageSegmentation"

    @torch.no_grad()
    def find(self, picture: Image.Image, text: str) -> Tensor:
        inputs = self.processor(text=[text], images=[picture], padding=True, truncation=True, return_tensors="pt")
        logits = self.model(**inputs.to(self.device)).logits.float()
        grid = logits.reshape(1, 1, *logits.shape[-2:])
        return interpolate(grid, picture.size[::-1], mode="bilinear").sigmoid()[0, 0].cpu()


class Florence2(Segmenter):
    """Florence-2's output is polygons, so a pixel is 0 or 1."""

    kind = "Florence2ForConditionalGeneration"

    @torch.no_grad()
    def find(self, picture: Image.Image, text: str) -> Tensor:
        inputs = self.processor(text=TASK + text, images=picture, return_tensors="pt").to(self.device)
        tokens = self.model.config.text_config.max_position_embeddings - 1
        made = self.model.generate(**inputs, max_new_tokens=min(tokens, 1024), do_sample=False, num_beams=3)
        (output,) = self.processor.batch_decode(made, skip_special_tokens=False)
        return self.drawn(output, picture.size)

    def drawn(self, message: str, size: tuple[int, int]) -> Tensor:
        """The polygons of an output; size is width and height, px."""
        found = self.processor.post_process_generation(text=message, task=TASK, image_size=size)[TASK]["polygons"]
        canvas = Image.new("L", size)
        for corners in (polygon for one in found for polygon in one if len(polygon) >= 6):
            ImageDraw.Draw(canvas).polygon([float(value) for value in corners], fill=1)
        return torch.from_numpy(np.array(canvas, dtype=np.float32))


SEGMENTERS: dict[str, type[Segmenter]] = {"clipseg": ClipSeg, "florence2": Florence2}  # by transformers' model type


def load(place: str, option: str, device: torch.device) -> Segmenter:
    """A network of one of these kinds.

    Args:
        place: hub id, or folder written by save_pretrained.
        option: the option that named it, for messages.

    Raises:
        ConfigError: the model can't be loaded, or is of another kind.
    """
    import transformers

    files.silence_loading()
    folder = Path(place).expanduser()
    where = folder if folder.is_dir() else place
    try:
        config = transformers.AutoConfig.from_pretrained(where)
        segmenter = SEGMENTERS.get(config.model_type)
        if segmenter is None:
            raise ConfigError(f"{option} is {place!r}, which is a {config.model_type}; {WAY_OUT}")
        kind: Any = getattr(transformers, segmenter.kind)
        model, info = kind.from_pretrained(where, use_safetensors=True, output_loading_info=True)
        processor = transformers.AutoProcessor.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} is {place!r}, which could not be loaded ({type(error).__name__}); {WAY_OUT}") from error
    if info["missing_keys"]:
        raise ConfigError(f"{option} is {place!r}, which lacks weights of {segmenter.kind}; give a whole model")
    return segmenter(model, processor, device)
