"""The held-out individuals: a few photos of each, in different places, as a user of DreamBooth would bring them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreambooth_lab.toybox.captions import plain_caption
from dreambooth_lab.toybox.shapes import COLOURS, PATTERNS, VARIANTS, Individual
from dreambooth_lab.toybox.world import BACKGROUNDS, SQUARE, SUBJECTS, Picture, Scene, Size, place, render

# never shown in a subject's photos, so that prompts about them are a test
UNSEEN_PLACES = ("on the beach", "in space")
LOOK_ALIKES = 24  # of each subject, in its gallery
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


def look_alikes(name: str, n: int) -> list[Individual]:
    """n different individuals that differ from a subject in one, two or three of colour, second colour, pattern, silhouette and
    feature, in turn."""
    return list(islice(similar(SUBJECTS[name], np.random.default_rng([sum(name.encode()), 0x6C])), n))


def similar(who: Individual, rng: np.random.Generator) -> Iterator[Individual]:
    """Different individuals that differ from one in one, two or three features, in turn; without end."""
    choices: dict[str, tuple[Any, ...]] = {
        "colour": tuple(COLOURS), "second": tuple(COLOURS), "pattern": PATTERNS, "variant": tuple(range(VARIANTS)),
        "feature": (False, True),
    }  # fmt: skip
    seen = {who}
    while True:
        changed = rng.choice(list(choices), 1 + (len(seen) - 1) % 3, replace=False)
        others = {str(key): [value for value in choices[str(key)] if value != getattr(who, str(key))] for key in changed}
        made = replace(who, **{key: values[rng.integers(len(values))] for key, values in others.items()})
        if made not in seen and made.colour != made.second:
            seen.add(made)
            yield made


def look_alike_pictures(name: str, n: int) -> list[Picture]:
    """One picture of each, in the places of the subject's photos."""
    rng = np.random.default_rng([sum(name.encode()), 0x67])
    return [render(place(who, PLACES[i % len(PLACES)], rng)) for i, who in enumerate(look_alikes(name, n))]


def write_subject(name: str, folder: Path, n: int = 5, size: Size = SQUARE) -> None:
    """A picture folder: 00.png with 00.txt beside it, masks under masks/."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for i, photo in enumerate(subject_photos(name, n, size)):
        photo.image.save(folder / f"{i:02d}.png")
        photo.mask.save(folder / "masks" / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(photo.caption + "\n", encoding="utf-8")
