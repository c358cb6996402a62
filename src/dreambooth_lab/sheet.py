"""Contact sheets of small images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from .storage.durable import atomic_file

CELL = 192  # px: a cell's longest side at most
TITLE = 14  # px above a row
GAP = 6  # px
TALL = 25  # rows per column
OUTSIDE = (200, 0, 160)  # the colour over the area outside the mask


class Row(NamedTuple):
    title: str
    cells: Sequence[Image.Image]


def small(image: Image.Image, side: int = CELL) -> Image.Image:
    """RGB, the longest side at most `side`."""
    made = image.convert("RGB")
    made.thumbnail((side, side), Image.Resampling.LANCZOS)
    return made


def overlay(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the area outside its mask [L] tinted."""
    covered = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, OUTSIDE), 0.65)
    return Image.composite(image.convert("RGB"), covered, mask.resize(image.size))


def draw(rows: Sequence[Row]) -> Image.Image:
    """All rows on one sheet, in columns."""
    most = max((len(row.cells) for row in rows), default=1)
    side = min(max((max(cell.size) for row in rows for cell in row.cells), default=CELL), CELL)
    width, height = most * (side + GAP) + GAP, side + TITLE + GAP
    columns = max(-(-len(rows) // TALL), 1)
    sheet = Image.new("RGB", (columns * width, min(max(len(rows), 1), TALL) * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left, top = number // TALL * width + GAP, number % TALL * height + GAP
        pen.text((left, top), row.title.encode("ascii", "replace").decode(), fill="black")
        for place, cell in enumerate(row.cells):
            sheet.paste(small(cell), (left + place * (side + GAP), top + TITLE))
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically; creates its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as aside:
        image.save(aside, format="PNG")
