"""Draw the image folders of the embedded world: `python -m dreambooth_lab.tools.draw_toybox [FOLDER]`.

    photos/SUBJECT/    the held-out subject, as its owner would photograph it
    masks/SUBJECT/     white where it is
    unseen/SUBJECT/    more photos of it for the eval loss, not for training
    classes/SUBJECT/   other members of its class, for prior preservation
    lookalikes/SUBJECT/  individuals that differ from it in one to three features, for the gallery

The package ships this output, so that `dataset=toybox` needs nothing else. With `--place "in the city"` all photos of a
subject are taken in one place, for experiments with masks; `--photos 10` draws another number of them. The first five and those
in unseen/ are always the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from dreambooth_lab.config import ConfigError
from dreambooth_lab.tools.common import cli
from dreambooth_lab.toybox.subjects import LOOK_ALIKES, PLACES, look_alike_pictures, subject_photos
from dreambooth_lab.toybox.world import BACKGROUNDS, SUBJECTS, Picture, draw_individual, place, render

SHIPPED = Path(__file__).resolve().parents[1] / "toybox" / "pictures"
PHOTOS, UNSEEN, MEMBERS = 5, 4, 12
Place = StrEnum("Place", {name: name for name in BACKGROUNDS})  # type: ignore[misc]


def class_pictures(kind: str, n: int) -> list[Picture]:
    """n random individuals of a class in random places; never one that looks like a held-out subject."""
    random = np.random.default_rng([sum(kind.encode()), 0x63])
    drawn = (draw_individual(random) for _ in count())
    members = (who for who in drawn if who.kind == kind)
    return [render(place(who, str(random.choice(list(BACKGROUNDS))), random)) for who, _ in zip(members, range(n), strict=False)]


def write(folder: Path, places: Sequence[str] = PLACES, photos: int = PHOTOS) -> None:
    """Write all folders.

    Args:
        places: used for the subjects' photos in turn.
        photos: of each subject, for training.
    """
    for subject, who in track(SUBJECTS.items(), "drawing"):
        drawn = subject_photos(subject, max(photos, PHOTOS) + UNSEEN, places=places)
        unseen = slice(PHOTOS, PHOTOS + UNSEEN)
        for i, photo in enumerate([*drawn[:PHOTOS], *drawn[unseen.stop :]][:photos]):
            _save(photo.image, folder / "photos" / subject / f"{i:02d}.png")
            _save(photo.mask, folder / "masks" / subject / f"{i:02d}.png")
        for i, photo in enumerate(drawn[unseen]):
            _save(photo.image, folder / "unseen" / subject / f"{i:02d}.png")
        for i, picture in enumerate(class_pictures(who.kind, MEMBERS)):
            _save(picture.image, folder / "classes" / subject / f"{i:02d}.png")
        for i, picture in enumerate(look_alike_pictures(subject, LOOK_ALIKES)):
            _save(picture.image, folder / "lookalikes" / subject / f"{i:02d}.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, optimize=True)


application = cli.app()


@application.command(help=cli.text(__doc__))
def main(
    folder: Annotated[Path, typer.Argument(help="output folder; default: the package's own", show_default=False)] = SHIPPED,
    photos: Annotated[int, typer.Option(min=1, help="photos of each subject for training")] = PHOTOS,
    place: Annotated[Place | None, typer.Option(help="one place for all photos of a subject")] = None,
) -> None:
    if place and folder == SHIPPED:
        raise ConfigError(f"--place is {place!r}, but the shipped images use several places; give a FOLDER")
    if photos != PHOTOS and folder == SHIPPED:
        raise ConfigError(f"--photos is {photos}, but {PHOTOS} photos are shipped; give a FOLDER")
    write(folder, (place,) if place else PLACES, photos)
    print(f"{sum(1 for _ in folder.rglob('*.png'))} images in {folder}")


if __name__ == "__main__":
    cli.run(application)
