"""DeepFloyd IF (DeepFloyd Lab 2023, after Imagen, Saharia et al. 2022): pixel-space UNets with T5. Stage I generates 64 px. Stage
II generates 256 px, conditioned on the upscaled, noised low-resolution image and its noise level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import draw
from ..batch import Cond, ImageInfo, Text
from ..config import ConfigError
from ..diffusion.path import VariancePreserving
from ..draw import Purpose
from . import files, schedule
from .family import OnStep
from .pipeline_family import PipelineFamily

SCALE = 4  # px of stage II for each of stage I
FIRST_STRIDE = 8  # px, of stage I
LEVEL = 250  # noise level of the low-resolution image in sampling, as in diffusers' pipeline


class DeepFloyd1(PipelineFamily):
    """Stage I. The learned variance, which the network outputs besides ε, is not trained."""

    pipelines = ("IFPipeline",)
    clock: ClassVar[tuple[float, float] | None] = (1.0, 0.0)  # the path's own
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"),
        "convolution": (r"re:.*resnets\..*\.(conv1|conv2|conv_shortcut)",),
    }
    skip_quantization: ClassVar[tuple[str, ...]] = (
        "time_embedding",
        "add_embedding",
        "class_embedding",
        "encoder_hid_proj",
        "time_emb_proj",
    )

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        states = cond["prompt_embeds"].to(self.dtype)
        return self.denoiser(x_t.to(self.dtype), self.path.native(t), states, return_dict=False)[0][:, : self.channels].float()


class DeepFloyd2(DeepFloyd1):
    """Stage II. Training downscales the image to get the low-resolution one. Validation generates it with stage I,
    `options.first_stage` (a folder or hub id), or downscales photos if that is null."""

    pipelines = ("IFSuperResolutionPipeline",)

    def _inputs(self) -> int:
        return 2 * self.channels

    def _read_facts(self) -> None:
        super()._read_facts()
        self.stride = max(self.stride, SCALE * FIRST_STRIDE)
        self.first_stage = self.options.get("first_stage")
        self.needs_image = self.first_stage is None
        noising = schedule.read(self.checkpoint.config("image_noising_scheduler"), self.named).path
        if not isinstance(noising, VariancePreserving):
            raise ConfigError(f"{self.named} has an image_noising_scheduler that is not supported")
        self.noising = noising

    def known_options(self) -> tuple[str, ...]:
        return ("first_stage",)

    def cond(self, text: Text, shown: Sequence[ImageInfo]) -> Cond:
        """The text, the upscaled and noised low-resolution image [B 3 H W], and its noise level [B], drawn uniformly."""
        levels = [int(draw.uniform(s.seed, s.sample, Purpose.LEVEL) * self.noising.num_steps) for s in shown]
        noise = torch.stack([draw.normal(s.seed, s.sample, Purpose.AUGMENTATION, tuple(s.latents.shape)) for s in shown])
        small = F.interpolate(torch.stack([s.latents for s in shown]), scale_factor=1 / SCALE, mode="bicubic", antialias=True)
        level = torch.tensor(levels)
        return Cond(text, small=self.noised(small, noise, level), level=level)

    def noised(self, small: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Low-resolution images [B 3 h w], upscaled to the noise's size and noised to their levels [B]."""
        large = F.interpolate(small, noise.shape[2:], mode="bilinear", align_corners=True)
        return self.noising.noise(large, noise, self.noising.time(level))

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        both = torch.cat([x_t, cond["small"]], 1).to(self.dtype)
        states = cond["prompt_embeds"].to(self.dtype)
        prediction = self.denoiser(both, self.path.native(t), states, class_labels=cond["level"], return_dict=False)[0]
        return prediction[:, : self.channels].float()

    @torch.no_grad()
    def generate(
        self, text: Text, negative: Text, *, height: int, width: int, guidance_scale: float, on_step: OnStep | None = None,
        photos: Sequence[Image.Image] = (), **options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        low, narrow = height // SCALE, width // SCALE
        if self.first_stage:
            options_of_first = {"height": low, "width": narrow, "guidance_scale": guidance_scale, **options}
            first = self._first.generate(text, negative, **options_of_first)
            self.__dict__.pop("_first")
        else:
            first = list(photos)
        image = torch.cat([files.to_pixels(picture, low, narrow) for picture in first]).to(self.device, self.dtype)
        return super().generate(
            text,
            negative,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            on_step=on_step,
            **self.image_arguments(image),
            **options,
        )

    def image_arguments(self, image: Any) -> dict[str, Any]:
        return {"image": image, "noise_level": LEVEL}

    @cached_property
    def _first(self) -> DeepFloyd1:
        """Stage I, for validation."""
        first = DeepFloyd1(**{**self.said_by_user, "pretrained": str(self.first_stage), "options": {}})
        first.device = self.device
        return first

    def _unpacking(self, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        return lambda latents: latents
