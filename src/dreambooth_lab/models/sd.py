"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): UNet, one CLIP text encoder, KL-VAE; ε or v as the checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ..batch import Cond
from .pipeline_family import PipelineFamily
from .sdxl import UNET_LEARNS


class StableDiffusion(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("StableDiffusionPipeline",)
    learns: ClassVar[Mapping[str, tuple[str, ...]]] = UNET_LEARNS
    kohya: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te"}
    keeps: ClassVar[tuple[str, ...]] = ("time_embedding", "time_emb_proj")

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        states = cond["prompt_embeds"].to(self.dtype)
        return self.denoiser(x_t.to(self.dtype), self.path.native(t), states, return_dict=False)[0].float()
