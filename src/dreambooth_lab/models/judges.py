"""Networks that look at pictures: CLIP and DINO, from transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from ..config import ConfigError
from . import files

Pictures = Sequence[Image.Image]


class Photo(NamedTuple):
    """One of the subject's."""

    image: Image.Image
    mask: Image.Image | None  # white where the subject is


class Judge(ABC):
    """A network, its preprocessing and a device.

    Args:
        place: hub id, or folder written by save_pretrained.
        key: of the configuration, for messages.

    Raises:
        ConfigError: the model can't be had.
    """

    attention: ClassVar[str | None] = None  # how the network computes it; None: as transformers chooses

    def __init__(self, place: str, key: str, device: torch.device, batch_size: int):
        from transformers import AutoImageProcessor, AutoModel

        files.quiet()
        folder = Path(place).expanduser()
        where = folder if folder.is_dir() else place
        try:
            model = AutoModel.from_pretrained(where, use_safetensors=True, attn_implementation=self.attention)
            self.model: Any = files.settle(model, device)
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

    def see_photos(self, photos: Sequence[Photo]) -> Tensor:
        """The subject's, whole [N D]."""
        return self.see([photo.image for photo in photos])

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

    attention = "eager"  # the only kind that can be looked at

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


class MaskedDino:
    """DINO of the subject alone: the mean of the patches it covers, so that a copied background counts for nothing.

    In photos with masks those are the patches under the mask. Generated pictures have none, and neither have other photos: there
    it is the patches that hold most of the class token's attention, by which DINO tells what stands in front (§4.2.2).
    """

    MASS = 0.6  # share of the attention that the patches of the foreground hold, as in the paper

    def __init__(self, dino: Dino):
        self.dino = dino

    def see(self, pictures: Pictures) -> Tensor:
        """Unit vectors [N D]."""
        return self.see_photos([Photo(picture, None) for picture in pictures])

    @torch.no_grad()
    def see_photos(self, photos: Sequence[Photo]) -> Tensor:
        """Unit vectors [N D]."""
        return normalize(torch.cat([self._see(photo) for photo in photos]), dim=-1)

    def _see(self, photo: Photo) -> Tensor:
        """[1 D]"""
        dino = self.dino
        pixels = dino.processor(images=[photo.image], return_tensors="pt")["pixel_values"].to(dino.device)
        output = dino.model(pixel_values=pixels, output_attentions=True)
        size = dino.model.config.patch_size
        own = (pixels.shape[-2] // size) * (pixels.shape[-1] // size)  # patches; before them come the class token and registers
        weights = self._under(photo.mask, size) if photo.mask else None
        if weights is None or not weights.any():  # no mask, or one that the crop to the network's square has lost
            weights = foreground(output.attentions[-1][:, :, 0, -own:].mean(1).float(), self.MASS)
        return ((output.last_hidden_state[:, -own:].float() * weights[..., None]).sum(1) / weights.sum()).cpu()

    def _under(self, mask: Image.Image, size: int) -> Tensor:
        """How much of each patch a mask covers [1 P], through the very geometry of its picture."""
        white = self.dino.processor(images=[mask.convert("RGB")], do_normalize=False, return_tensors="pt")["pixel_values"]
        return avg_pool2d(white[:, :1].float(), size).flatten(1).to(self.dino.device)


def foreground(attention: Tensor, mass: float) -> Tensor:
    """1 for the patches with most attention that together hold `mass` of it, 0 for the others [B P]."""
    values, order = attention.sort(dim=-1, descending=True)
    before = values.cumsum(-1) - values
    keep = (before < mass * values.sum(-1, keepdim=True)).to(attention.dtype)
    return torch.zeros_like(attention).scatter(-1, order, keep)


def _vector(output: Any) -> Tensor:
    """The projected embedding, which transformers returns bare or wrapped, by version."""
    return output if isinstance(output, Tensor) else output.pooler_output
