"""Qwen-Image (Qwen Team 2025): a two-stream transformer of a rectified flow over packed latents of a video VAE, with Qwen2.5-VL.
Called through the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .family import Spec
from .pipeline_family import PipelineFamily


class QwenImage(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("QwenImagePipeline",)
    clock: ClassVar[tuple[float, float] | None] = (1000.0, 0.0)  # its share of the path's
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
            "attn.to_add_out",
        ),
        "feed_forward": ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    }  # fmt: skip
    programs: ClassVar[tuple[str, ...]] = ("ComfyUI", "InvokeAI")
    spec = Spec("qwen_image", "Qwen-Image", "https://github.com/QwenLM/Qwen-Image")
