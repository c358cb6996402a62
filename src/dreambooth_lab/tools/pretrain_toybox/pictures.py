"""Pictures for the documentation: the world, its held-out subjects, reconstructions, samples, and one photograph."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth_lab.tools.pretrain_toybox.runner import grid
from dreambooth_lab.tools.pretrain_toybox.unet import sample
from dreambooth_lab.tools.pretrain_toybox.vae import held_out, to_tensor
from dreambooth_lab.toybox.subjects import subject_photos
from dreambooth_lab.toybox.world import BACKGROUNDS, CLASSES, SUBJECTS, render, scene


def tensors(images: list[Image.Image]) -> Tensor:
    return torch.stack([to_tensor(np.asarray(image)) for image in images])


def world_sheet() -> list[Tensor]:
    return [tensors([render(scene(10 * row + i)).image for i in range(10)]) for row in range(4)]


def subject_sheet() -> list[Tensor]:
    return [tensors([photo.image for photo in subject_photos(name, 6)]) for name in SUBJECTS]


@torch.no_grad()
def rebuilt(vae: Any, x: Tensor) -> list[Tensor]:
    return [x, vae.decode(vae.encode(x).latent_dist.mean).sample]


def photographs(folder: Path, n: int = 8) -> Tensor:
    """Squares from the middle of real photographs, at the world's size."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".jpg", ".jpeg", ".png"))[:: max(1, 24 // n)][:n]
    squares = []
    for path in paths:
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        squares.append(image.crop((left, top, left + side, top + side)).resize((128, 128), Image.Resampling.LANCZOS))
    return tensors(squares)


def class_by_place(pipe: Any, cfg: Any) -> list[Tensor]:
    """One row a class, one column a place."""
    colours = ("red", "blue", "yellow", "orange", "green", "purple")
    rows = []
    for row, (kind, colour) in enumerate(zip(CLASSES, colours, strict=True)):
        texts = [f"a photo of {'an' if colour[0] == 'o' else 'a'} {colour} {kind} {place}" for place in BACKGROUNDS]
        rows.append(sample(pipe, texts, 100 * row, cfg.steps, cfg.guidance))
    return rows


def run(cfg: Any) -> None:
    from diffusers import StableDiffusionXLPipeline

    docs = Path(cfg.docs)
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(cfg.base)
    pipe.set_progress_bar_config(disable=True)
    grid(world_sheet(), docs / "world.png")
    grid(subject_sheet(), docs / "subjects.png")
    grid(rebuilt(pipe.vae, held_out(10)[0]), docs / "vae.png")
    grid(class_by_place(pipe, cfg.judge), docs / "samples.png")
    if cfg.photographs:
        grid(rebuilt(pipe.vae, photographs(Path(cfg.photographs))), docs / "photographs.png")
