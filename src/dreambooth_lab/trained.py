"""A diffusers pipeline with an exported adapter loaded into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from .config import enums
from .factory import build_adapter, build_family, trained_token


class TrainedPipeline:
    """The base model's diffusers pipeline with an export in it.

    Args:
        cfg: of the run that made it.
        export: the folder it wrote, or a file of it.
    """

    def __init__(self, cfg: DictConfig, export: Path):
        self.family, word, self.long_captions = build_family(cfg), trained_token(cfg), cfg.dataset.long_captions
        family = self.family
        self.adapter, self.pipeline = build_adapter(cfg), family.pipeline()
        self.adapter.load_into(self.pipeline, family.denoiser_part, export, family.target_modules)
        folder = export if export.is_dir() else export.parent
        self.scale_token = family.load_token(self.pipeline, folder, word) if word else None
        self.pipeline.to(family.device)

    def set_scale(self, strength: float) -> None:
        """Scale what was learned: 0 is the base model, 1 what was trained."""
        self.adapter.set_scale(self.pipeline, strength)
        if self.scale_token:
            self.scale_token(strength)

    def draw(self, prompt: str, negative: str, edge: int, steps: int, guidance: float, seed: int, image: Any = None) -> list[Any]:
        """One picture.

        Args:
            negative: empty for the unconditional input, as in training.
            edge: of the square, px.
            image: to begin from, for models that change a given one.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        said = self._prompt_arguments(prompt, negative)
        said |= self.family.image_arguments(image) if image else self.family.size_arguments(edge, edge)
        said |= self.family.guidance(guidance)
        return self.pipeline(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **said).images

    @torch.no_grad()
    def _prompt_arguments(self, prompt: str, negative: str) -> dict[str, Any]:
        """Arguments of the pipeline's call for its prompts; of a run that reads long captions whole, their embeddings."""
        if self.long_captions is enums.LongCaptions.truncate:
            return {"prompt": prompt} | ({"negative_prompt": negative} if negative else {})
        family, pipeline = self.family, self.pipeline
        family.fit_chunks([prompt, negative])
        parts = family.text_encoder_parts
        encoders = [(getattr(pipeline, part.replace("text_encoder", "tokenizer")), getattr(pipeline, part)) for part in parts]
        return family.text_arguments(family.read_text([prompt], encoders), family.read_text([negative or None], encoders))
