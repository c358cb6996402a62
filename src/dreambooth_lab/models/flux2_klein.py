"""FLUX.2 klein (Black Forest Labs 2026): a transformer of a rectified flow over patched, batch-normalised latents, Qwen3's hidden
layers for text. Asked through the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .pipeline_family import PipelineFamily


class Flux2Klein(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("Flux2KleinPipeline",)
    learns: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
            "attn.to_add_out", "attn.to_qkv_mlp_proj", r"re:single_transformer_blocks\..*\.attn\.to_out",
        ),
        "feed_forward": ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    }  # fmt: skip
