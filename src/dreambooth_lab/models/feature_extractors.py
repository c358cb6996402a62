"""Image encoders for metrics: CLIP and DINO, from transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from ..config import ConfigError
from . import files

Images = Sequence[Image.Image]


class Photo(NamedTuple):
    """One photo of the subject."""

    image: Image.Image
    mask: Image.Image | None  # white where the subject is


class FeatureExtractor(ABC):
    """An image encoder with its preprocessing. It is on its device only inside `on_device`.

    Args:
        place: hub id, or folder written by save_pretrained.
        key: the configuration's key, for messages.

    Raises:
        ConfigError: the model can't be loaded.
    """

    attention: ClassVar[str | None] = None  # attention implementation; None: transformers' default

    def __init__(self, place: str, key: str, device: torch.device, batch_size: int):
        from transformers import AutoImageProcessor, AutoModel

        files.silence_loading()
        folder = Path(place).expanduser()
        where = folder if folder.is_dir() else place
        try:
            model = AutoModel.from_pretrained(where, use_safetensors=True, attn_implementation=self.attention)
            self.model: Any = files.freeze_to(model, torch.device("cpu"))
            self.processor = AutoImageProcessor.from_pretrained(where)
        except (OSError, ValueError) as error:
            way_out = f"set {key} to a folder written by save_pretrained or to a reachable hub id, or to null"
            raise ConfigError(f"{key} is {place!r}, which could not be loaded ({type(error).__name__}); {way_out}") from error
        self.place, self.device, self.batch_size = str(place), device, batch_size
        self.users = 0

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """A context in which the network is on its device; afterwards that memory is free again."""
        self.users += 1
        if self.users == 1:
            self.model.to(self.device)
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self.model.to("cpu")

    @torch.no_grad()
    def embed(self, pictures: Images) -> Tensor:
        """Image embeddings, unit vectors [N D]."""
        batches = [pictures[i : i + self.batch_size] for i in range(0, len(pictures), self.batch_size)]
        pixels = (self.processor(images=list(batch), return_tensors="pt")["pixel_values"].to(self.device) for batch in batches)
        with self.on_device():
            return normalize(torch.cat([self._features(batch).float().cpu() for batch in pixels]), dim=-1)

    def embed_photos(self, photos: Sequence[Photo]) -> Tensor:
        """Embeddings of the subject's whole photos [N D]."""
        return self.embed([photo.image for photo in photos])

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """Preprocessed images → features [B D]."""


class Clip(FeatureExtractor):
    """CLIP (Radford et al. 2021): images and texts in one embedding space."""

    def __init__(self, place: str, key: str, device: torch.device, batch_size: int):
        from transformers import AutoTokenizer

        super().__init__(place, key, device, batch_size)
        self.tokenizer = AutoTokenizer.from_pretrained(place)

    def _features(self, pixels: Tensor) -> Tensor:
        return _vector(self.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings, unit vectors [N D]."""
        ids = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        with self.on_device():
            return normalize(_vector(self.model.get_text_features(**ids)).float().cpu(), dim=-1)


class Dino(FeatureExtractor):
    """DINO (Caron et al. 2021): the class token, which distinguishes individuals of one class."""

    attention = "eager"  # the only implementation that returns attention maps

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


class MaskedDino:
    """DINO of the foreground: the mean of the patches with most of the class token's attention (Caron et al. 2021,
    §4.2.2), so that a copied background has little influence.

    The same rule applies to photos and generated images, so a byte-identical image has similarity 1. The
    photos' masks don't select patches, since generated images have none: with masks, a copy of a photo had only .46 to
    .65. The masks are used to check the rule: `under_masks`.
    """

    MASS = 0.6  # share of the attention of the foreground's patches, as in the paper

    def __init__(self, dino: Dino):
        self.dino = dino

    def on_device(self) -> AbstractContextManager[None]:
        return self.dino.on_device()

    @torch.no_grad()
    def embed(self, pictures: Images) -> Tensor:
        """Unit vectors [N D]."""
        with self.on_device():
            return normalize(torch.cat([self._see(picture) for picture in pictures]), dim=-1)

    def embed_photos(self, photos: Sequence[Photo]) -> Tensor:
        """Unit vectors [N D]."""
        return self.embed([photo.image for photo in photos])

    @torch.no_grad()
    def under_masks(self, photos: Sequence[Photo]) -> float | None:
        """Share of the foreground patches inside the photos' masks, the mean over photos; None without masks."""
        shares = []
        for photo in photos:
            if photo.mask:
                front, _ = self._look(photo.image)
                shares.append(float((front * self._under(photo.mask)).sum() / front.sum()))
        return fmean(shares) if shares else None

    def _see(self, picture: Image.Image) -> Tensor:
        """[1 D]"""
        front, patches = self._look(picture)
        return ((patches * front[..., None]).sum(1) / front.sum()).cpu()

    def _look(self, picture: Image.Image) -> tuple[Tensor, Tensor]:
        """1 for foreground patches, 0 for others [1 P]; and the patches' features [1 P D]."""
        dino = self.dino
        pixels = dino.processor(images=[picture], return_tensors="pt")["pixel_values"].to(dino.device)
        with dino.on_device():
            output = dino.model(pixel_values=pixels, output_attentions=True)
        size = dino.model.config.patch_size
        own = (pixels.shape[-2] // size) * (
            pixels.shape[-1] // size
        )  # number of patches; the class token and registers come before them
        front = foreground(output.attentions[-1][:, :, 0, -own:].mean(1).float(), self.MASS)
        return front, output.last_hidden_state[:, -own:].float()

    def _under(self, mask: Image.Image) -> Tensor:
        """The share of each patch that a mask covers [1 P], with the image's preprocessing."""
        white = self.dino.processor(images=[mask.convert("RGB")], do_normalize=False, return_tensors="pt")["pixel_values"]
        return avg_pool2d(white[:, :1].float(), self.dino.model.config.patch_size).flatten(1).to(self.dino.device)


def foreground(attention: Tensor, mass: float) -> Tensor:
    """1 for the patches with most attention whose sum reaches `mass`, 0 for the others [B P]."""
    values, order = attention.sort(dim=-1, descending=True)
    before = values.cumsum(-1) - values
    keep = (before < mass * values.sum(-1, keepdim=True)).to(attention.dtype)
    return torch.zeros_like(attention).scatter(-1, order, keep)


def _vector(output: Any) -> Tensor:
    """The projected embedding, which transformers returns as a tensor or in an output object, depending on the version."""
    return output if isinstance(output, Tensor) else output.pooler_output
