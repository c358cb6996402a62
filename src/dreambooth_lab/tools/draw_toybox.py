"""Draw the embedded world's picture folders: `python -m dreambooth_lab.tools.draw_toybox [FOLDER]`.

    photos/SUBJECT/    the held-out individual, as its owner would photograph it
    masks/SUBJECT/     white where it is
    unseen/SUBJECT/    more photos of it, to be held back from training: for the eval loss
    classes/SUBJECT/   ordinary members of its class, as a user of prior preservation would collect them

The package ships what this writes, so that `dataset=toybox` needs nothing else. With `--place "in the city"` every photo of a
subject is taken in that one place, as when an owner never leaves home: what a mask is for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth_lab.toybox.subjects import PLACES, subject_photos
from dreambooth_lab.toybox.world import BACKGROUNDS, SUBJECTS, Picture, draw_individual, place, render

SHIPPED = Path(__file__).resolve().parents[1] / "toybox" / "pictures"
PHOTOS, UNSEEN, MEMBERS = 5, 4, 12


def class_pictures(kind: str, n: int) -> list[Picture]:
    """n random individuals of a class in random places; never one that looks like a held-out subject."""
    random = np.random.default_rng([sum(kind.encode()), 0x63])
    drawn = (draw_individual(random) for _ in count())
    members = (who for who in drawn if who.kind == kind)
    return [render(place(who, str(random.choice(list(BACKGROUNDS))), random)) for who, _ in zip(members, range(n), strict=False)]


def write(folder: Path, places: Sequence[str] = PLACES) -> None:
    """All of it; `places` are those of the subjects' photos, in turn."""
    for subject, who in SUBJECTS.items():
        drawn = subject_photos(subject, PHOTOS + UNSEEN, places=places)
        for i, photo in enumerate(drawn[:PHOTOS]):
            _save(photo.image, folder / "photos" / subject / f"{i:02d}.png")
            _save(photo.mask, folder / "masks" / subject / f"{i:02d}.png")
        for i, photo in enumerate(drawn[PHOTOS:]):
            _save(photo.image, folder / "unseen" / subject / f"{i:02d}.png")
        for i, picture in enumerate(class_pictures(who.kind, MEMBERS)):
            _save(picture.image, folder / "classes" / subject / f"{i:02d}.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=SHIPPED)
    parser.add_argument("--place", choices=list(BACKGROUNDS), help="where every photo of a subject is taken")
    asked = parser.parse_args()
    folder = asked.folder
    if asked.place and folder == SHIPPED:
        parser.error("--place needs a FOLDER: the pictures that ship have their own places")
    write(folder, (asked.place,) if asked.place else PLACES)
    print(f"{sum(1 for _ in folder.rglob('*.png'))} pictures in {folder}")


if __name__ == "__main__":
    main()
