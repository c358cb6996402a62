"""FLUX.1 dev and schnell (Black Forest Labs 2024): a transformer of a rectified flow over packed latents, CLIP and T5 for text.

A guidance-distilled network (dev) is trained at guidance 1, the prediction without guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..batch import Cond
from .family import Spec
from .pipeline_family import PipelineFamily


class Flux(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("FluxPipeline",)
    clock: ClassVar[tuple[float, float] | None] = (1000.0, 0.0)  # its share of the path's
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
            "attn.to_add_out",
        ),
        "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp",
                         "re:single_transformer_blocks\\..*\\.proj_out"),
    }  # fmt: skip
    kohya: ClassVar[Mapping[str, str]] = {"transformer": "lora_transformer", "text_encoder": "lora_te1"}
    programs: ClassVar[tuple[str, ...]] = ("ComfyUI", "Forge", "InvokeAI")

    @property
    def spec(self) -> Spec:  # type: ignore[override]
        kind = "dev" if self.network["guidance_embeds"] else "schnell"
        return Spec("flux1", f"flux-1-{kind}", "https://github.com/black-forest-labs/flux")

    def denoise(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        pipeline, (rows, channels, height, width) = self.pipeline_class, x_t.shape
        packed = pipeline._pack_latents(x_t.to(self.dtype), rows, channels, height, width)
        states = cond["prompt_embeds"].to(self.dtype)
        guidance = torch.ones(rows, device=x_t.device) if self.network["guidance_embeds"] else None
        prediction = self.denoiser(
            hidden_states=packed, timestep=self.native(t).to(self.dtype) / 1000, guidance=guidance,
            pooled_projections=cond["pooled_prompt_embeds"].to(self.dtype), encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=x_t.device, dtype=self.dtype),
            img_ids=pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, x_t.device, self.dtype), return_dict=False,
        )[0]  # fmt: skip
        return pipeline._unpack_latents(prediction, height * self.factor, width * self.factor, self.factor).float()
