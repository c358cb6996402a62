"""The interface of a model family: what the method needs from a pretrained model.

Callers use t in [0, 1], latents in the denoiser's scale, and the records `Text` and `Cond`, whose tensors only the family reads.
A family is one file. It is built without weights. Each part is loaded at first use; `release_encoders` frees the text encoders
and the VAE, so they need not be in memory together with the denoiser.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path as Folder
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from ..batch import Caption, Cond, ImageInfo, Text
from ..diffusion.path import Path
from ..embedding import Slot
from ..quant import Quantiser
from .sharding import Lockstep

OnStep = Callable[[int, Tensor], None]
TextEncoders = list[tuple[Any, nn.Module]]  # each with its tokenizer before it


class Spec(NamedTuple):
    """Names of a base model in other programs, in the headers by which they list LoRAs."""

    version: str = ""  # sd-scripts' ss_base_model_version (A1111)
    architecture: str = ""  # ModelSpec's, without the suffix for the kind of file (Forge)
    implementation: str = "diffusers"  # ModelSpec's


class Family(ABC):
    """A pretrained model: its properties are attributes, its operations are methods."""

    path: Path  # how data becomes noise, what the network predicts
    stride: int  # pixels: every side of a training image is a multiple of it
    factor: int  # pixels per latent cell
    channels: int  # C of the latents
    times: tuple[float, float] = (0.0, 1.0)  # the range of t that the model was trained on
    clock: ClassVar[tuple[float, float] | None] = None  # native = first · timestep + second, of a denoiser's timestep, if known
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]]  # group → suffixes of layer names, or "re:" and a regular expression
    text_target_modules: ClassVar[Mapping[str, tuple[str, ...]]]  # the same for the text encoders that can be trained
    denoiser_part: str  # name of the denoiser's sub-folder in a diffusers checkpoint
    text_encoder_parts: tuple[str, ...]  # names of the text encoders' sub-folders
    trainable_text_encoder_parts: tuple[str, ...]  # those text encoders that can be trained
    kohya: ClassVar[Mapping[str, str]]  # part → its prefix in kohya's key layout; empty: programs read diffusers' keys
    programs: ClassVar[tuple[str, ...]]  # programs that read LoRAs of this family in such a file
    spec: Spec  # their names of the base model
    loads_lora: bool  # whether the diffusers pipeline has `load_lora_weights`
    chunks: int = 1  # number of chunks that every caption is encoded in; see `fit_chunks`
    guides_in_one_batch: ClassVar[bool] = False  # guidance's two predictions are halves of one call, the unconditional one first
    needs_image: bool = False  # an image-to-image model: validation gives it the subject's photos to start from
    shards: int = 0  # number of processes that the denoiser's blocks are divided over; 0: not divided
    device: torch.device = torch.device("cpu")
    quantiser: Quantiser = Quantiser({}, None)  # which parts are quantised

    @abstractmethod
    def check_device(self) -> None:
        """Check that `device` supports the configuration.

        Raises:
            ConfigError: names what is not supported.
        """

    @abstractmethod
    def shift(self, height: int, width: int) -> float:
        """The sampler's time shift s for latents of this size (cells): t' = s t / (1 + (s - 1) t); 1 means no shift."""

    def time_of(self, timestep: Tensor) -> Tensor:
        """The t of what the denoiser is called with, by this class or by any pipeline."""
        assert self.clock is not None  # factory.require_supported
        scale, offset = self.clock
        return (scale * timestep.float() + offset) / self.path.num_steps

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that is fine-tuned. It is loaded at first use, frozen and in evaluation mode."""

    def offloaded(self) -> list[int]:
        """Bytes of each of the denoiser's blocks that are offloaded to host memory, or divided over processes."""
        return []

    @abstractmethod
    def shard(self) -> Lockstep:
        """Divide the denoiser's blocks over the `shards` processes, all of which call this, instead of offloading them."""

    @property
    @abstractmethod
    def text_encoders(self) -> TextEncoders:
        """The base model's text encoders, in the order of `text_encoder_parts`; loaded at first use, freed by
        `release_encoders`."""

    @abstractmethod
    def load_text_encoders(self) -> TextEncoders:
        """A second copy of the base model's text encoders, to be trained; `text_encoders` keeps the originals."""

    @abstractmethod
    def read_text(self, captions: Sequence[Caption], encoders: TextEncoders) -> Text:
        """Encode captions, one row each, float32, differentiable. An empty caption is the conditioning of caption dropout
        (`model.empty_caption`); None is the sampler's unconditional input when there is no negative prompt."""

    @abstractmethod
    def fit_chunks(self, captions: Iterable[str]) -> None:
        """Raise `chunks` until the longest of these captions fits; every caption is then encoded in that many chunks.

        Raises:
            ConfigError: the model can't encode more than one chunk.
        """

    @abstractmethod
    def truncated_part(self, captions: Iterable[str]) -> list[str]:
        """What the text encoders cut off from captions that are too long: one line per encoder that truncates."""

    @abstractmethod
    def count_tokens(self, caption: str) -> dict[str, int]:
        """Number of tokens of a caption for each text encoder, without the start and end tokens."""

    @torch.no_grad()
    def encode_text(self, captions: Sequence[Caption], encoders: TextEncoders | None = None) -> Text:
        """`read_text` without gradient, on the CPU; with the base model's encoders unless others are given."""
        return self.read_text(captions, encoders or self.text_encoders).to(torch.device("cpu"))

    @abstractmethod
    def token_slots(self, word: str, encoders: TextEncoders) -> list[Slot]:
        """Where each trainable text encoder holds the embedding of a word.

        Raises:
            ConfigError: an encoder splits the word into several tokens.
        """

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] [B 3 H W] → posterior mean and std [B C h w] in the denoiser's latent scale."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents in the denoiser's scale [B C h w] → pixels in [-1, 1] [B 3 H W]."""

    def cond(self, text: Text, shown: Sequence[ImageInfo]) -> Cond:
        """The denoiser's conditioning for rows with these captions and images."""
        return Cond(text)

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's prediction for x_t [B C h w], float32."""

    @abstractmethod
    def generate(
        self, text: Text, negative: Text, *, height: int, width: int, guidance_scale: float, on_step: OnStep | None = None,
        photos: Sequence[Image.Image] = (), **options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Generate images, one per row of `text`, with the family's diffusers pipeline and the current weights.

        Args:
            on_step: called with the number of sampler steps done, from 1, and the latents [B C h w].
            photos: initial images, one per row, if the family `needs_image`.
        """

    @abstractmethod
    def preview(self, latents: Tensor) -> Tensor:
        """Decode latents [B C h w] approximately and fast: pixels in [-1, 1] [B 3 H W]."""

    @abstractmethod
    def pipeline(self) -> Any:
        """The diffusers pipeline of the base model, as a user would load it, without an adapter."""

    @abstractmethod
    def loading(self, base: str, config: str | None) -> str:
        """Code that creates `pipeline` from the base model, with the variant and dtype used here.

        Args:
            base: the base model's name in the code.
            config: the name of a single file's config.
        """

    @abstractmethod
    def image_arguments(self, image: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call that give it an initial image, if the family `needs_image`."""

    @abstractmethod
    def text_arguments(self, text: Text, negative: Text) -> dict[str, Any]:
        """Arguments of the pipeline's call that pass the output of `read_text` instead of prompts."""

    @abstractmethod
    def size_arguments(self, height: int, width: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for an image of this size, px, with the options of the configuration."""

    @abstractmethod
    def guidance(self, scale: float) -> dict[str, float]:
        """Arguments of the pipeline's call that set the guidance scale."""

    @abstractmethod
    def save_token(self, folder: Folder, word: str, rows: Sequence[Tensor], header: Mapping[str, str]) -> Folder:
        """Write `embeddings/WORD.safetensors` with one embedding per text encoder, as textual inversion files have them; returns
        the file, relative to the folder."""

    @abstractmethod
    def load_token(self, pipeline: Any, folder: Folder, word: str) -> Callable[[float], None]:
        """Load a saved embedding for a word into a pipeline's text encoders. Returns a function that interpolates between the
        base model's embedding (0) and the saved one (1)."""

    @abstractmethod
    def token_usage(self, word: str) -> str:
        """Example code that loads the embedding of the folder `export` into `pipeline`."""

    @abstractmethod
    def release_encoders(self) -> None:
        """Free the VAE and the text encoders; they are loaded again when used."""

    @property
    @abstractmethod
    def skip_quantization(self) -> tuple[str, ...]:
        """Components of layer names that are not quantised."""

    @abstractmethod
    def text_identity(self) -> str:
        """Hash of everything `encode_text` depends on besides the captions; reads files, loads nothing."""

    @abstractmethod
    def denoiser_identity(self) -> str:
        """Hash of everything `denoise` depends on besides its inputs, without an adapter; reads files, loads nothing."""

    @abstractmethod
    def image_identity(self) -> str:
        """Hash of everything `encode_image` depends on besides the pixels; reads files, loads nothing."""
