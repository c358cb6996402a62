"""Lumina-Image 2.0 (Alpha-VLLM 2025): a single-stream transformer of a rectified flow, Gemma 2 for text. Its timesteps run
backwards and its output is negated; the pipeline's own call handles both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .family import Spec
from .pipeline_family import PipelineFamily


class Lumina2(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("Lumina2Pipeline",)
    clock: ClassVar[tuple[float, float] | None] = (-1000.0, 1000.0)  # runs backwards, from 0 to 1
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        "feed_forward": ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
    }
    spec = Spec("lumina2", "lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0")
