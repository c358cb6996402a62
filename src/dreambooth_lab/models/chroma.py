"""Chroma (Lodestone Rock 2025): FLUX.1 schnell's transformer with its modulation distilled away, T5 with a mask for text.
Asked through the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .flux import Flux
from .pipeline_family import PipelineFamily


class Chroma(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("ChromaPipeline",)
    learns = Flux.learns
    kohya: ClassVar[Mapping[str, str]] = {"transformer": "lora_transformer"}
