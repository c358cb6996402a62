"""Networks that look at pictures: CLIP and DINO, from transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..config import ConfigError
from . import files

Pictures = Sequence[Image.Image]


class Judge(ABC):
    """A network, its preprocessing and a device.

    Args:
        place: hub id, or folder written by save_pretrained.
        key: of the configuration, for messages.

    Raises:
        ConfigError: the model can't be had.
    """

    def __init__(self, place: str, key: str, device: torch.device, batch_size: int):
        from transformers import AutoImageProcessor, AutoModel

        files.quiet()
        folder = Path(place).expanduser()
        where = folder if folder.is_dir() else place
        try:
            self.model: Any = files.settle(AutoModel.from_pretrained(where, use_safetensors=True), device)
            self.processor = AutoImageProcessor.from_pretrained(where)
        except (OSError, ValueError) as error:
            way_out = f"set {key} to a folder written by save_pretrained or to a hub id this machine can reach, or to null"
            raise ConfigError(f"{key} is {place!r}, which could not be loaded ({type(error).__name__}); {way_out}") from error
        self.place, self.device, self.batch_size = str(place), device, batch_size

    @torch.no_grad()
    def see(self, pictures: Pictures) -> Tensor:
        """Unit vectors [N D]."""
        batches = [pictures[i : i + self.batch_size] for i in range(0, len(pictures), self.batch_size)]
        pixels = (self.processor(images=list(batch), return_tensors="pt")["pixel_values"].to(self.device) for batch in batches)
        return normalize(torch.cat([self._features(batch).float().cpu() for batch in pixels]), dim=-1)

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Preprocessed pictures → vectors [B D]."""


class Clip(Judge):
    """CLIP (Radford et al. 2021): pictures and texts in one space."""

    def __init__(self, place: str, key: str, device: torch.device, batch_size: int):
        from transformers import AutoTokenizer

        super().__init__(place, key, device, batch_size)
        self.tokenizer = AutoTokenizer.from_pretrained(place)

    def _features(self, pixels: Tensor) -> Tensor:
        return _vector(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N D]."""
        ids = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return normalize(_vector(self.model.get_text_features(**ids)).float().cpu(), dim=-1)


class Dino(Judge):
    """DINO (Caron et al. 2021): the class token, which tells individuals of one class apart."""

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


def _vector(output: Any) -> Tensor:
    """The projected embedding, which transformers returns bare or wrapped, by version."""
    return output if isinstance(output, Tensor) else output.pooler_output
