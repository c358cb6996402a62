"""`python -m dreambooth_lab.tools.masks --input_dir PHOTOS --output_dir MASKS`: a mask for each photo, for `dataset=masked`.

Takes the options of SimpleTuner's generate_dataset_masks.py. Exits with 1 if a photo got no mask; each is named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.progress import track

from .. import sheet
from ..config import ConfigError
from ..data.sources import base, decode
from ..data.sources.decode import UNREADABLE
from ..data.sources.folder import Folder
from .common import cli
from .mask_methods.finders import Finder, Method, NoMask, finder
from .mask_methods.grabcut import Finish, Found, Pixels

LEAST = 0.001  # minimum share of a photo; smaller masks count as not found
TEXT_THRESHOLD = 0.4  # CLIPSeg's confidence is rarely high


application = cli.app()


@application.command(help=__doc__)
def main(
    input_dir: Annotated[Path, typer.Option(help="the photos, with subfolders")],
    output_dir: Annotated[Path, typer.Option(help="for the masks: x/a.png for x/a.jpg")],
    text_input: Annotated[str | None, typer.Option(help="text: what to find, such as 'dog'")] = None,
    method: Annotated[Method | None, typer.Option(help="text if --text_input and --model are given, else grabcut")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="text: a CLIPSeg or Florence-2, hub id or folder, such as CIDAS/clipseg-rd64-refined; rembg: an .onnx file"
        ),
    ] = None,
    rect: Annotated[
        str | None, typer.Option(help="grabcut: LEFT,TOP,WIDTH,HEIGHT of the subject, as shares of the sides")
    ] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="minimum confidence: 0.4 (text), 0.5")] = None,
    soft: Annotated[bool, typer.Option(help="keep the confidence above the threshold as grey levels")] = False,
    largest_only: Annotated[bool, typer.Option(help="keep only the largest connected component")] = False,
    fill_holes: Annotated[bool, typer.Option(help="fill holes inside the subject")] = False,
    padding: Annotated[int, typer.Option("--padding", "--mask-padding", min=0, help="enlarge the subject by this many px")] = 0,
    invert: Annotated[bool, typer.Option("--invert", "--invert-mask", help="mask the background instead of the subject")] = False,
    blur: Annotated[int, typer.Option("--blur", "--mask-blur", min=0, help="blur borders over this many px")] = 0,
    force: Annotated[bool, typer.Option(help="overwrite existing masks")] = False,
    contact_sheet: Annotated[Path | None, typer.Option(help="photo | mask | overlay; default: beside the folders")] = None,
) -> None:
    input_dir, output_dir = input_dir.expanduser().resolve(), output_dir.expanduser().resolve()
    if not input_dir.is_dir():
        raise ConfigError(f"--input_dir is {str(input_dir)!r}, which is not a folder; give the folder of the photos")
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output_dir is {str(output_dir)!r}, which is a file; give a folder")
    if input_dir == output_dir:
        raise ConfigError(
            f"--output_dir is {str(output_dir)!r}, the photos' own folder; give another, for instance a folder in it"
        )
    method = method or (Method.text if text_input and model else Method.grabcut)
    usual = TEXT_THRESHOLD if method is Method.text else 0.5
    finish = Finish(usual if threshold is None else threshold, soft, largest_only, fill_holes, padding, invert, blur)
    find = finder(method, text_input, model, rect)
    made = write(input_dir, output_dir, find, finish, force)
    where = contact_sheet or sheet_path(input_dir, output_dir)
    sheet.save(sheet.draw([_row(input_dir, output_dir, name, made) for name in sorted([*made.masks, *made.failed])]), where)
    print(f"{made.fresh} masks made, {len(made.masks) - made.fresh} existed already (--force overwrites them); see {where}")
    for name, why in made.failed.items():
        print(f"no mask: {name}: {why}")
    if made.failed:
        raise typer.Exit(1)


class Made:
    """The results by photo."""

    def __init__(self) -> None:
        self.masks: dict[str, str] = {}  # photo → its mask
        self.failed: dict[str, str] = {}  # photo → the reason why it has none
        self.fresh = 0


def write(input_dir: Path, output_dir: Path, find: Finder, finish: Finish, force: bool) -> Made:
    """Masks of all photos that have none; a photo in which nothing is found gets none.

    Raises:
        ConfigError: there are no photos.
    """
    photos = Folder(str(input_dir), str(output_dir) if input_dir in output_dir.parents else None)
    items = list(photos.items())
    if not items:
        raise ConfigError(f"--input_dir is {str(input_dir)!r}, which contains no photos; give a folder of photos")
    there = {} if force or not output_dir.is_dir() else {base.stem(i.name): i.name for i in Folder(str(output_dir)).items()}
    made, taken = Made(), dict[str, str]()
    for item in track(items, "making masks"):
        stem = base.stem(item.name)
        first = taken.setdefault(stem, item.name)
        if item.problem or first != item.name:
            made.failed[item.name] = item.problem or f"{first} has the same name up to its extension, and would share its mask"
        elif stem in there:
            made.masks[item.name] = there[stem]
        else:
            _make(photos, item.name, output_dir / f"{stem}.png", find, finish, made)
    return made


def _make(photos: Folder, name: str, path: Path, find: Finder, finish: Finish, made: Made) -> None:
    try:
        data = photos.read(name)
        photo = Image.fromarray(decode.decode(data).permute(1, 2, 0).numpy())
    except UNREADABLE as error:
        made.failed[name] = f"can't be decoded: {error}"
        return
    try:
        sheet.save(Image.fromarray(_mask(find(data, photo), finish)), path)
    except NoMask as error:
        made.failed[name] = str(error)
    else:
        made.masks[name], made.fresh = path.relative_to(path.parents[name.count("/")]).as_posix(), made.fresh + 1


def _mask(found: Found, finish: Finish) -> Pixels:
    """Make a photo's mask; raises `NoMask` if nothing is found."""
    if (found >= finish.threshold).mean() < LEAST:
        raise NoMask("nothing was found in it; try --rect, a lower --threshold or another --method, or paint it by hand")
    mask = finish.of(found)
    if mask is None:
        raise NoMask("its mask would be all black; remove --invert, or use less --padding")
    return mask


def sheet_path(input_dir: Path, output_dir: Path) -> Path:
    """The default path contact_sheet_NAME.png, beside the folders, so that it is used neither as a photo nor as a mask."""
    inside = input_dir in output_dir.parents
    place = input_dir.parent if inside else output_dir.parent
    while place == input_dir:
        place = place.parent
    return place / f"contact_sheet_{'_'.join(output_dir.relative_to(place).parts)}.png"


def _row(input_dir: Path, output_dir: Path, name: str, made: Made) -> sheet.Row:
    try:
        pixels = decode.decode((input_dir / name).read_bytes()).permute(1, 2, 0).numpy()
    except UNREADABLE:
        return sheet.Row(f"{name}: NO MASK", [])
    photo = sheet.small(Image.fromarray(pixels))
    if name not in made.masks:
        return sheet.Row(f"{name}: NO MASK", [photo])
    with Image.open(output_dir / made.masks[name]) as file:
        mask = file.convert("L").resize(photo.size)
    return sheet.Row(name, [photo, mask, sheet.overlay(photo, mask)])


if __name__ == "__main__":
    cli.run(application)
