"""Chroma (Lodestone Rock 2025): FLUX.1 schnell's transformer with its modulation distilled away, T5 with a mask for text.
Called through the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .family import Spec
from .flux import Flux
from .pipeline_family import PipelineFamily


class Chroma(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("ChromaPipeline",)
    clock: ClassVar[tuple[float, float] | None] = (1000.0, 0.0)  # its share of the path's
    target_modules = Flux.target_modules
    kohya: ClassVar[Mapping[str, str]] = {"transformer": "lora_transformer"}
    programs: ClassVar[tuple[str, ...]] = ("ComfyUI",)
    spec = Spec("chroma", "chroma", "https://huggingface.co/lodestones/Chroma")
