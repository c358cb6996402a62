"""FLUX.2 klein (Black Forest Labs 2026): a transformer of a rectified flow over patched, batch-normalised latents, Qwen3's hidden
layers for text. Called through the pipeline's own call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .family import Spec
from .pipeline_family import PipelineFamily

HEADS_4B = 24


class Flux2Klein(PipelineFamily):
    """Any checkpoint of the architecture."""

    pipelines = ("Flux2KleinPipeline",)
    clock: ClassVar[tuple[float, float] | None] = (1000.0, 0.0)  # its share of the path's
    target_modules: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": (
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
            "attn.to_add_out", "attn.to_qkv_mlp_proj", r"re:single_transformer_blocks\..*\.attn\.to_out",
        ),
        "feed_forward": ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    }  # fmt: skip
    programs: ClassVar[tuple[str, ...]] = ("ComfyUI", "InvokeAI")

    @property
    def spec(self) -> Spec:  # type: ignore[override]
        size = 4 if self.network["num_attention_heads"] == HEADS_4B else 9
        return Spec(f"flux_2_klein_{size}b", f"Flux.2-klein-{size}b", "https://github.com/black-forest-labs/flux2")
