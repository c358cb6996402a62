"""Stable Diffusion XL (Podell et al. 2023): UNet with text_time conditioning, two CLIP text encoders, KL-VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..batch import Cond, ImageInfo, Text
from .family import Spec
from .pipeline_family import PipelineFamily

UNET_LEARNS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolution": ("re:.*resnets\\..*\\.(conv1|conv2|conv_shortcut)", "re:.*samplers\\..*\\.conv"),
}
UNET_PROGRAMS = ("ComfyUI", "A1111", "Forge", "InvokeAI", "sd-scripts")


class SDXL(PipelineFamily):
    """Any checkpoint of SDXL's architecture, of any size, with any number of latent channels."""

    pipelines = ("StableDiffusionXLPipeline",)
    clock: ClassVar[tuple[float, float] | None] = (1.0, 0.0)  # the path's own
    guides_in_one_batch: ClassVar[bool] = True
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = UNET_LEARNS
    kohya: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    programs: ClassVar[tuple[str, ...]] = UNET_PROGRAMS
    spec = Spec("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models")
    # Small layers that affect everything: time, size and pooled text; the text encoder's last projection.
    skip_quantization: ClassVar[tuple[str, ...]] = ("time_embedding", "add_embedding", "time_emb_proj", "text_projection")
    chunkable: ClassVar[bool] = True

    def cond(self, text: Text, shown: Sequence[ImageInfo]) -> Cond:
        """The text, and six numbers per image: original height and width, crop top and left, target height, width."""
        sizes = (picture.size for picture in shown)
        return Cond(text, size=torch.tensor([(*s.original, *s.crop, *s.target) for s in sizes]).float())

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        values = {"text_embeds": cond["pooled_prompt_embeds"].to(self.dtype), "time_ids": cond["size"]}
        states = cond["prompt_embeds"].to(self.dtype)
        return self.denoiser(
            x_t.to(self.dtype), self.path.native(t), states, added_cond_kwargs=values, return_dict=False
        )[0].float()  # fmt: skip
