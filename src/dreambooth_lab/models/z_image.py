"""Z-Image (Tongyi Lab 2025): a single-stream transformer of a rectified flow, with a hidden layer of Qwen3 for text and captions
of different lengths. Its timesteps run backwards and its output is negated; the pipeline's own call handles both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .family import Spec
from .pipeline_family import PipelineFamily


class ZImage(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("ZImagePipeline",)
    clock: ClassVar[tuple[float, float] | None] = (-1000.0, 1000.0)  # runs backwards, from 0 to 1
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        "feed_forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    }
    programs: ClassVar[tuple[str, ...]] = ("ComfyUI", "InvokeAI")
    spec = Spec("z_image", "Z-Image", "https://github.com/Tongyi-MAI/Z-Image")
