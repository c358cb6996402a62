"""A diffusers pipeline with an exported adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from .config import enums
from .factory import build_adapter, build_family, trained_token
from .models.steering import Steering, steered

UNSTEERED = Steering(enums.Superclass.none, 0.0, None)


class TrainedPipeline:
    """The base model's diffusers pipeline with an export loaded.

    Args:
        cfg: of the run that wrote the export.
        export: the folder of the export, or a file of it.
    """

    def __init__(self, cfg: DictConfig, export: Path):
        self.family, word, self.long_captions = build_family(cfg), trained_token(cfg), cfg.dataset.long_captions
        family = self.family
        self.adapter, self.pipeline = build_adapter(cfg), family.pipeline()
        self.adapter.load_into(self.pipeline, family.denoiser_part, export, family.target_modules)
        self.adapter.follow_time(getattr(self.pipeline, family.denoiser_part), family.time_of)
        folder = export if export.is_dir() else export.parent
        self.scale_token = family.load_token(self.pipeline, folder, word) if word else None
        self.pipeline.to(family.device)

    def set_scale(self, strength: float) -> None:
        """Scale the trained update: 0 is the base model, 1 the trained model."""
        self.adapter.set_scale(self.pipeline, strength)
        if self.scale_token:
            self.scale_token(strength)

    def draw(
        self, prompt: str, negative: str, edge: int, steps: int, guidance: float, seed: int, image: Any = None,
        steering: Steering = UNSTEERED, about_class: str | None = None,
    ) -> list[Any]:  # fmt: skip
        """Generate one image.

        Args:
            negative: empty for the unconditional input, as in training.
            edge: of the square, px.
            image: the input of image-to-image models.
            about_class: the same prompt about the class, for steering.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        denoiser = getattr(self.pipeline, self.family.denoiser_part)

        def call(words: str) -> list[Any]:
            arguments = self._prompt_arguments(words, negative) | self.family.guidance(guidance)
            arguments |= self.family.image_arguments(image) if image else self.family.size_arguments(edge, edge)
            made: list[Any] = self.pipeline(
                num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **arguments
            ).images
            return made

        class_call = partial(call, about_class) if about_class else None
        with steered(denoiser, steering, steps, class_call, partial(self.adapter.weakened, denoiser)):
            return call(prompt)

    @torch.no_grad()
    def _prompt_arguments(self, prompt: str, negative: str) -> dict[str, Any]:
        """Prompt arguments of the pipeline's call; with chunked long captions, their embeddings."""
        if self.long_captions is enums.LongCaptions.truncate:
            return {"prompt": prompt} | ({"negative_prompt": negative} if negative else {})
        family, pipeline = self.family, self.pipeline
        family.fit_chunks([prompt, negative])
        parts = family.text_encoder_parts
        encoders = [(getattr(pipeline, part.replace("text_encoder", "tokenizer")), getattr(pipeline, part)) for part in parts]
        return family.text_arguments(family.read_text([prompt], encoders), family.read_text([negative or None], encoders))
