"""Decode images and masks, and read the headers of image files."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from . import colour
from .base import Header

QUARTER_TURNS = {5, 6, 7, 8}  # EXIF orientations that swap width and height


UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, OverflowError, MemoryError)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def head(data: bytes) -> Header:
    """An image's size and format from its first bytes; pixels are not decoded.

    Raises:
        One of `UNREADABLE`.
    """
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        has_orientation = (
            image.format != "PNG" or b"eXIf" in data or b"Raw profile type exif" in data
        )  # else getexif decodes a whole PNG
        turned = has_orientation and image.getexif().get(0x0112) in QUARTER_TURNS
        size = (width, height) if turned else (height, width)
        return Header(size, digest(data), image.has_transparency_data, colour.profile_status(image))


def _upright(data: bytes) -> Image.Image:
    """The first frame, upright, 8 bits per channel."""
    upright: Image.Image = Image.open(io.BytesIO(data))
    upright.load()
    ImageOps.exif_transpose(upright, in_place=True)  # in place: copies dominate the time for large photos
    if upright.mode.startswith("I") or upright.mode == "F":
        values = np.asarray(upright, dtype=np.float64)
        top = 1.0 if upright.mode == "F" and values.max(initial=0) <= 1 else 255.0
        top = 65535.0 if values.max(initial=0) > 255 or upright.mode.startswith("I;16") else top
        upright = Image.fromarray(np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8))
    return upright


def decode(data: bytes) -> Tensor:
    """Pixels [3 H W] uint8 in sRGB, upright; transparent parts become white.

    Raises:
        One of `UNREADABLE`: the file is truncated or not an image.
    """
    upright = colour.to_srgb(_upright(data))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    upright = upright if upright.mode == "RGB" else upright.convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def decode_mask(data: bytes, alpha: bool) -> Tensor:
    """A mask [1 H W] uint8, upright: the image's brightness, or its alpha channel (all 255 if it has none)."""
    upright = _upright(data)
    if alpha:
        mask = upright.convert("RGBA").getchannel("A")
    elif upright.has_transparency_data:
        upright = upright.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright).convert("L")
    else:
        mask = upright.convert("L")
    return torch.from_numpy(np.array(mask))[None]
