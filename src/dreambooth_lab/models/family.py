"""The contract of a model family: facts that the method needs, and verbs that adapt a foreign model to it.

Everything outside speaks of t in [0, 1], of latents in the denoiser's own scale, and of `Text` and `Cond`, whose tensors only
the family knows; what is particular to a network stays in its family's one file. A family is built without weights; each part
loads when first used, and leaves memory by `release_encoders`, so text encoders, VAE and denoiser need not be in memory together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as Folder
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ..batch import Cond, Shown, Text
from ..diffusion.path import Path
from ..embedding import Slot
from ..quant import Quantiser

OnStep = Callable[[int, Tensor], None]
TextEncoders = list[tuple[Any, nn.Module]]  # each with its tokenizer before it


class Family(ABC):
    """Facts are attributes, verbs are methods."""

    path: Path  # how data becomes noise, what the network predicts
    stride: int  # pixels: every side of a training picture is a multiple of it
    factor: int  # pixels per latent cell
    channels: int  # C of the latents
    times: tuple[float, float] = (0.0, 1.0)  # the part of the path it was trained on
    learns: ClassVar[
        Mapping[str, tuple[str, ...]]
    ]  # group → endings of layer names, or "re:" and an expression: what gets adapters
    text_learns: ClassVar[Mapping[str, tuple[str, ...]]]  # the same of the text encoders that can learn
    denoiser_part: str  # the denoiser's folder in a pipeline's
    text_encoder_parts: tuple[str, ...]  # and the text encoders'
    teachable_parts: tuple[str, ...]  # those of the text encoders that can learn
    kohya: ClassVar[Mapping[str, str]]  # part → what kohya's key layout calls it; empty: no program reads it for this family
    refines: bool = False  # its pictures begin from given ones, so validation shows it the subject's photos
    device: torch.device = torch.device("cpu")
    quantiser: Quantiser = Quantiser({}, None)  # which parts are kept in fewer bits

    @abstractmethod
    def check_device(self) -> None:
        """Refuse what was asked for and `device` can't do.

        Raises:
            ConfigError: says what is lacking.
        """

    @abstractmethod
    def shift(self, height: int, width: int) -> float:
        """The time shift that its sampler uses for latents of a size (cells): t' = s t / (1 + (s - 1) t); 1 for none."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that learns; loaded, frozen and in evaluation mode at first use."""

    @property
    @abstractmethod
    def text_encoders(self) -> TextEncoders:
        """The base model's, in the order of `text_encoder_parts`; loaded at first use, dropped by `release_encoders`."""

    @abstractmethod
    def load_text_encoders(self) -> TextEncoders:
        """The base model's once more, for who teaches them: what `text_encoders` says does not change with these."""

    @abstractmethod
    def read_text(self, captions: Sequence[str], encoders: TextEncoders) -> Text:
        """A row for each caption, float32, differentiable. An empty caption is the unconditional input."""

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str], encoders: TextEncoders | None = None) -> Text:
        """`read_text` to keep: without gradient, on the CPU; by the base model's encoders unless others are given."""
        return self.read_text(captions, encoders or self.text_encoders).to(torch.device("cpu"))

    @abstractmethod
    def token_slots(self, word: str, encoders: TextEncoders) -> list[Slot]:
        """Where each text encoder that can learn keeps the embedding of a word.

        Raises:
            ConfigError: an encoder splits the word into several tokens.
        """

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] [B 3 H W] → posterior mean and std [B C h w] in the denoiser's latent scale."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents in the denoiser's scale [B C h w] → pixels in [-1, 1] [B 3 H W]."""

    def cond(self, text: Text, shown: Sequence[Shown]) -> Cond:
        """What the denoiser is told of rows with these captions and pictures."""
        return Cond(text)

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's answer at x_t [B C h w], float32."""

    @abstractmethod
    def generate(
        self, text: Text, negative: Text, *, height: int, width: int, guidance_scale: float, on_step: OnStep | None = None,
        photos: Sequence[Image.Image] = (), **options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Pictures, one per row of `text`, through the family's own diffusers pipeline and the current weights.

        Args:
            on_step: told the number of sampler steps done, from 1, and the latents [B C h w].
            photos: what to begin from, if the family `refines`; as many as rows.
        """

    @abstractmethod
    def preview(self, latents: Tensor) -> Tensor:
        """A quick look at latents [B C h w]: pixels in [-1, 1] [B 3 H W]."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The diffusers pipeline from this family's files, as a user would load it: no adapter in it."""

    @abstractmethod
    def begin(self, image: Any) -> dict[str, Any]:
        """Arguments of `pipeline()`'s call that make it begin from a picture, if the family `refines`."""

    @abstractmethod
    def guidance(self, scale: float) -> dict[str, float]:
        """The arguments of `pipeline()`'s call that set the guidance scale."""

    @abstractmethod
    def save_token(self, folder: Folder, rows: Sequence[Tensor]) -> None:
        """Write `learned_embeds.safetensors` with one embedding per text encoder, as textual inversion files have them."""

    @abstractmethod
    def load_token(self, pipeline: Any, folder: Folder, word: str) -> Callable[[float], None]:
        """Put a saved embedding in a word's place in a pipeline's text encoders; returns what puts a point in its place that lies
        so far on the line from the base model's (0) to the saved one (1)."""

    @abstractmethod
    def token_usage(self, word: str) -> str:
        """Code that puts the embedding in the folder `export` into `pipeline`."""

    @abstractmethod
    def release_encoders(self) -> None:
        """Drop VAE and text encoders from memory; they load again when used."""

    @property
    @abstractmethod
    def keeps(self) -> tuple[str, ...]:
        """Components of layer names that quantisation leaves alone."""

    @abstractmethod
    def text_identity(self) -> str:
        """Hash of all that `encode_text` depends on besides the captions; reads files, loads nothing."""

    @abstractmethod
    def denoiser_identity(self) -> str:
        """Hash of all that `denoise` depends on besides its inputs, no adapter in it; reads files, loads nothing."""

    @abstractmethod
    def image_identity(self) -> str:
        """Hash of all that `encode_image` depends on besides the pixels; reads files, loads nothing."""
