"""Where pictures come from: a folder, searched through. Headers and bytes are read here, pixels only when asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
QUARTER_TURNS = {5, 6, 7, 8}  # EXIF orientations that swap width and height


class Picture(NamedTuple):
    path: Path
    name: str  # relative to its folder, with /
    size: tuple[int, int]  # height, width, as shown (EXIF orientation applied)
    digest: str  # SHA-256 of the file


class Rejected(NamedTuple):
    name: str
    reason: str


def scan(folder: Path, minimum: int) -> tuple[list[Picture], list[Rejected]]:
    """All pictures below `folder` in name order, and those that can't be used, each with the rule that rejected it.

    Args:
        minimum: px; the least length of the short edge.
    """
    pictures, rejected = [], []
    for path in sorted(p for p in folder.expanduser().rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        name = path.relative_to(folder.expanduser()).as_posix()
        try:
            picture = _open(path, name)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            rejected.append(Rejected(name, f"can't be read: {error}"))
            continue
        if min(picture.size) < minimum:
            rule = f"short edge {min(picture.size)} px < dataset.minimum_image_size={minimum}"
            rejected.append(Rejected(name, rule))
        else:
            pictures.append(picture)
    return pictures, rejected


def _open(path: Path, name: str) -> Picture:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112) in QUARTER_TURNS
    return Picture(path, name, (width, height) if turned else (height, width), digest)


def read(picture: Picture) -> Tensor:
    """Pixels [3 H W] uint8, upright; transparent parts become white.

    Raises:
        OSError, SyntaxError, ValueError: the file is truncated or not a picture.
    """
    with Image.open(picture.path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)
