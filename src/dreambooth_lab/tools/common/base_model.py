"""Images of a configuration's base model for prompts, and the change of its prediction between prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from rich.progress import track
from torch import Tensor

from ... import draw
from ...batch import Cond, ImageInfo, Size, Text
from ...config import ConfigError, enums
from ...diffusion.time import shift
from ...draw import Purpose
from ...factory import build_family
from ...models.family import Family

TIMES = (0.2, 0.4, 0.6, 0.8)  # of the model's own range, before its time shift


def load(cfg: DictConfig) -> Family:
    """The model family of a configuration.

    Raises:
        ConfigError: it can't generate images from prompts only.
    """
    family = build_family(cfg)
    if family.needs_image:
        raise ConfigError(
            f"model.pretrained is {cfg.model.pretrained!r}, which is image-to-image and can't generate from prompts only"
        )
    return family


def images(cfg: DictConfig, family: Family, prompts: Sequence[str], count: int | None = None) -> list[list[Image.Image]]:
    """A row of images for each prompt, generated as in validation: image i of every prompt starts from the same noise.

    Args:
        count: images per prompt; None: validation.num_images.
    """
    asked, n = cfg.validation, count or cfg.validation.num_images
    if cfg.dataset.long_captions is enums.LongCaptions.chunk:
        family.fit_chunks([*prompts, asked.negative_prompt])
    texts, negative = _texts(family, prompts), family.encode_text([asked.negative_prompt or None])
    family.release_encoders()
    return [
        family.generate(
            texts[i].repeat(n), negative.repeat(n), height=asked.resolution, width=asked.resolution,
            generator=[torch.Generator().manual_seed(asked.seed + k) for k in range(n)],
            num_inference_steps=asked.num_inference_steps, guidance_scale=asked.guidance_scale,
        )
        for i in track(range(len(prompts)), "drawing", disable=not cfg.trainer.progress)
    ]  # fmt: skip


@torch.no_grad()
def movement(cfg: DictConfig, family: Family, before: str, prompts: Sequence[str], count: int = 2) -> Tensor:
    """How much the model's prediction changes from one prompt to others: ‖D(x_t, p) - D(x_t, p_0)‖ / ‖D(x_t, p_0)‖, the mean
    over fixed times and noises [prompts].

    Args:
        before: p_0; x_t are its noised images.
        count: images of p_0.
    """
    latents = _latents(family, images(cfg, family, [before], count)[0])
    texts = _texts(family, [before, *prompts])
    family.release_encoders()
    size = Size((cfg.validation.resolution,) * 2, (0, 0), (cfg.validation.resolution,) * 2)
    shown = [ImageInfo(size, x0, 0, i, cfg.dataset.aesthetic_score) for i, x0 in enumerate(latents)]
    predictions = (
        _predictions(family, latents, family.cond(texts[i].repeat(count), shown))
        for i in track(range(len(prompts) + 1), "running the model", disable=not cfg.trainer.progress)
    )
    first = next(predictions)
    moved = [((prediction - first).norm(dim=-1) / first.norm(dim=-1)).mean() for prediction in predictions]
    return torch.stack(moved).cpu() if moved else torch.zeros(0)


def _texts(family: Family, prompts: Sequence[str]) -> list[Text]:
    """One by one, so that the bits of one don't depend on the others."""
    return [family.encode_text([prompt]) for prompt in prompts]


def _latents(family: Family, drawn: Sequence[Image.Image]) -> Tensor:
    """The images' latents, the posterior's mean [N C h w], on the CPU."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in drawn])
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([family.encode_image(one[None].to(family.device))[0].float().cpu() for one in pixels])


def _predictions(family: Family, latents: Tensor, cond: Cond) -> Tensor:
    """The denoiser's predictions at all times [T N D], with noise that is a function only of the row and the timestep."""
    device, (low, high) = family.device, family.times
    conditioning, found = cond.to(device), []
    n, *shape = latents.shape
    for k, share in enumerate(TIMES):
        noise = [draw.normal(0, k * n + i, Purpose.EVALUATION, tuple(shape)) for i in range(n)]
        x0, eps = latents.to(device), torch.stack(noise).to(device)
        t = shift(torch.full((n,), low + (high - low) * share, dtype=torch.float64), family.shift(*shape[1:]))
        x_t = family.path.noise(x0, eps, t.to(device))
        found.append(family.denoise(x_t, t.to(device), conditioning).float().flatten(1))
    return torch.stack(found)
