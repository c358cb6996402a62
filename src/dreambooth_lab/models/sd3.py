"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a transformer of a rectified flow, two CLIP text encoders and T5, which may be
missing from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from ..batch import Cond
from .family import Spec
from .pipeline_family import PipelineFamily

MEDIUM = 24  # blocks


class StableDiffusion3(PipelineFamily):
    """Any checkpoint of the architecture: medium, 3.5-medium, 3.5-large."""

    pipelines = ("StableDiffusion3Pipeline",)
    clock: ClassVar[tuple[float, float] | None] = (1.0, 0.0)  # the path's own
    guides_in_one_batch: ClassVar[bool] = True
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
            r"re:.*\.attn2?\.(to_q|to_k|to_v|to_out\.0)",  # 3.5-medium has a second attention in some blocks
        ),
        "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    }  # fmt: skip
    kohya: ClassVar[Mapping[str, str]] = {
        "transformer": "lora_transformer",
        "text_encoder": "lora_te1",
        "text_encoder_2": "lora_te2",
    }
    programs: ClassVar[tuple[str, ...]] = ("ComfyUI",)

    @property
    def spec(self) -> Spec:  # type: ignore[override]
        medium = "5-medium" if self.network["dual_attention_layers"] else "medium"
        size = "5-large" if self.network["num_layers"] > MEDIUM else medium
        return Spec(f"sd3_{size}", f"stable-diffusion-3-{size}")

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.denoiser(
            hidden_states=x_t.to(self.dtype), timestep=self.native(t), encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(self.dtype), return_dict=False,
        )[0].float()  # fmt: skip
