"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022): UNet, one CLIP text encoder, KL-VAE; ε or v by the checkpoint's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ..batch import Cond
from ..config import enums
from .family import Spec
from .pipeline_family import PipelineFamily
from .sdxl import UNET_LEARNS, UNET_PROGRAMS

CROSS_1 = 768  # width of the text encoder of 1.x


class StableDiffusion(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("StableDiffusionPipeline",)
    clock: ClassVar[tuple[float, float] | None] = (1.0, 0.0)  # the path's own
    guides_in_one_batch: ClassVar[bool] = True
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = UNET_LEARNS
    kohya: ClassVar[Mapping[str, str]] = {"unet": "lora_unet", "text_encoder": "lora_te"}
    programs: ClassVar[tuple[str, ...]] = UNET_PROGRAMS
    skip_quantization: ClassVar[tuple[str, ...]] = ("time_embedding", "time_emb_proj")
    chunkable: ClassVar[bool] = True

    @property
    def spec(self) -> Spec:  # type: ignore[override]
        second = self.network["cross_attention_dim"] != CROSS_1
        v = self.path.prediction is enums.Prediction.v_prediction
        architecture = f"stable-diffusion-v2-{'768-v' if v else '512'}" if second else "stable-diffusion-v1"
        return Spec(f"sd_v{1 + second}{'_v' if v else ''}", architecture)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        states = cond["prompt_embeds"].to(self.dtype)
        return self.denoiser(x_t.to(self.dtype), self.path.native(t), states, return_dict=False)[0].float()
