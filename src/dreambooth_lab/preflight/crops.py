"""A contact sheet of the training crops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor

from .. import sheet
from ..data.module import DreamBoothData
from ..data.preparation import geometry, mask
from ..data.preparation.entry import Entry
from ..data.sources import decode

MOST = 24  # images of each kind that are shown
ACROSS = 6  # cells per row


def save(data: DreamBoothData, path: Path) -> None:
    """Write the sheet atomically: the subject's photos first, then class images, each once with its first shape and crop."""
    rows: list[sheet.Row] = []
    for is_class, use in ((False, "photos"), (True, "class images")):
        firsts = {(e.picture.source.root, e.picture.name): e for e in reversed(data.entries) if e.spec.is_class is is_class}
        own = sorted(firsts.values(), key=lambda entry: entry.picture.name)
        cells = list(_cells(own[:MOST]))
        more = f", the first {MOST} of {len(own)}" if len(own) > MOST else ""
        for first in range(0, len(cells), ACROSS):
            rows.append(sheet.Row(f"{use} as cropped{more}" if first == 0 else "", cells[first : first + ACROSS]))
    sheet.save(sheet.draw(rows), path)


def _cells(entries: list[Entry]) -> Iterator[Image.Image]:
    """Each entry's first crop, with the area outside its mask tinted."""
    for entry in entries:
        pixels, variant = decode.decode(entry.picture.source.read(entry.picture.name)), entry.variants[0]
        crop = _image(geometry.apply(variant, pixels))
        weights = _image(geometry.apply(variant, mask.load(entry.mask, entry.picture))) if entry.mask else None
        yield sheet.overlay(crop, weights) if weights else crop


def _image(pixels: Tensor) -> Image.Image:
    """[3 H W] or [1 H W] uint8."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
