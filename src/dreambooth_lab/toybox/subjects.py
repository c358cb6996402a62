"""The held-out individuals: a few photos of each, in different places, as a user of DreamBooth would bring them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth_lab.toybox.captions import plain_caption
from dreambooth_lab.toybox.world import BACKGROUNDS, SQUARE, SUBJECTS, Scene, Size, place, render

# never shown in a subject's photos, so that prompts about them are a test
UNSEEN_PLACES = ("on the beach", "in space")
PLACES = tuple(b for b in BACKGROUNDS if b not in UNSEEN_PLACES)


@dataclass(frozen=True)
class Photo:
    image: Image.Image  # RGB
    mask: Image.Image  # L, 255 where the subject is
    caption: str
    scene: Scene


def subject_scene(name: str, index: int, places: Sequence[str] = PLACES) -> Scene:
    """The subject's photo number `index`: places in turn, the rest at random."""
    rng = np.random.default_rng([sum(name.encode()), index, 0x73])
    return place(SUBJECTS[name], places[index % len(places)], rng)


def subject_photos(name: str, n: int = 5, size: Size = SQUARE, places: Sequence[str] = PLACES) -> list[Photo]:
    """The first `n` photos of a subject; `size` is (height, width)."""
    pictures = [render(subject_scene(name, i, places), size) for i in range(n)]
    return [Photo(p.image, p.mask, plain_caption(p.scene), p.scene) for p in pictures]


def write_subject(name: str, folder: Path, n: int = 5, size: Size = SQUARE) -> None:
    """A picture folder: 00.png with 00.txt beside it, masks under masks/."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(subject_photos(name, n, size)):
        photo.image.save(folder / f"{i:02d}.png")
        photo.mask.save(folder / "masks" / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(photo.caption + "\n", encoding="utf-8")
