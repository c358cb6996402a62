"""The SDXL refiner (Podell et al. 2023, §2.5): a UNet for the last fifth of the noise schedule, conditioned on an aesthetic
score, with only the second of SDXL's text encoders. Its latents are SDXL's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from ..batch import Cond, ImageInfo, Text
from ..config import ConfigError
from . import files
from .family import OnStep, Spec
from .sdxl import SDXL

LEAST = 5  # minimum sampler steps over the whole schedule, of which the refiner takes a fifth


class SDXLRefiner(SDXL):
    """Any checkpoint of the architecture. Validation starts from photos, noised up to the refiner's range, not from prompts."""

    pipelines = ("StableDiffusionXLImg2ImgPipeline",)
    kohya: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder_2": "lora_te"}  # ComfyUI's
    programs: ClassVar[tuple[str, ...]] = ("ComfyUI",)
    spec = Spec("sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner", SDXL.spec.implementation)
    times = (0.0, 0.2)
    needs_image = True
    guides_in_one_batch: ClassVar[bool] = False  # prompts are not what its pictures begin from

    def _read_facts(self) -> None:
        super()._read_facts()
        if "text_encoder" in self.checkpoint.parts or not self.checkpoint.index.get("requires_aesthetics_score"):
            raise ConfigError(
                f"{self.named} is not a refiner, which has one text encoder and takes an aesthetic score; use model=sdxl"
            )

    def cond(self, text: Text, shown: Sequence[ImageInfo]) -> Cond:
        """The text, and five numbers per image: original height and width, crop top and left, aesthetic score."""
        numbers = [(*s.size.original, *s.size.crop, s.aesthetic_score) for s in shown]
        return Cond(text, size=torch.tensor(numbers).float())

    @torch.no_grad()
    def generate(
        self, text: Text, negative: Text, *, height: int, width: int, guidance_scale: float, on_step: OnStep | None = None,
        photos: Sequence[Image.Image] = (), **options: Any,
    ) -> list[Image.Image]:  # fmt: skip
        first = torch.cat([self.encode_image(files.to_pixels(photo, height, width))[0] for photo in photos])
        options |= self.image_arguments(first.to(self.device, self.dtype))
        options["num_inference_steps"] = max(options["num_inference_steps"], LEAST)
        return super().generate(
            text, negative, height=height, width=width, guidance_scale=guidance_scale, on_step=on_step, **options
        )

    def image_arguments(self, image: Any) -> dict[str, Any]:
        return {"image": image, "strength": self.times[1]}

    def _unpacking(self, shape: torch.Size) -> Callable[[Tensor], Tensor]:
        return lambda latents: latents
