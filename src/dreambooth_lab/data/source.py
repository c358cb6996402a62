"""Pictures wherever they are, behind one interface: list them, read one's bytes, decode it.

A source lists items without reading them; each carries a stamp that changes whenever its content may have.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .spec import Where

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
OTHER_PICTURES = {".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".svg", ".raw", ".dng", ".cr2", ".nef", ".arw"}
QUARTER_TURNS = {5, 6, 7, 8}  # EXIF orientations that swap width and height
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, OverflowError, MemoryError)

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # large photos; Pillow refuses what is absurd


class Item(NamedTuple):
    """One picture as a listing shows it."""

    name: str  # unique in its source, with /
    stamp: str  # equal stamps: equal bytes; "" promises nothing
    captions: tuple[str, ...] = ()  # that came with it
    problem: str | None = None  # why it can't be read


class Source(Protocol):
    @property
    def root(self) -> str:
        """What tells this source from others."""

    def items(self) -> Iterator[Item]:
        """Every picture, in name order; what looks like a picture and can't be read has a `problem`.

        Raises:
            ConfigError: there is nothing to list.
        """

    def read(self, name: str) -> bytes:
        """The picture's file.

        Raises:
            OSError: it can't be read.
        """

    def text(self, name: str) -> str | None:
        """What is written in the text file beside a picture; None if there is none."""


class Header(NamedTuple):
    """What a scan keeps of a picture."""

    size: tuple[int, int]  # height, width, as shown (EXIF orientation applied)
    digest: str  # SHA-256 of the file
    alpha: bool  # has transparency


class Picture(NamedTuple):
    source: Source
    name: str  # unique in its source, with /
    size: tuple[int, int]  # height, width, as shown (EXIF orientation applied)
    digest: str  # SHA-256 of the file
    alpha: bool
    captions: tuple[str, ...]  # that came with it

    @property
    def stem(self) -> str:
        return stem(self.name)


class Rejected(NamedTuple):
    name: str
    reason: str


LOCAL = "stat:"  # how stamps of this machine's files begin


def local_stamp(stat: os.stat_result) -> str:
    """Changes with every change of a file; the time of the last change can't be set by hand, unlike that of the content."""
    return f"{LOCAL}{stat.st_ctime_ns}:{stat.st_mtime_ns}:{stat.st_size}:{stat.st_ino}"


def stem(name: str) -> str:
    """x/a.b.jpg → x/a.b: what a picture, its caption and its mask have in common."""
    return str(PurePosixPath(name).with_suffix(""))


def open_source(where: Where, spool: str) -> Source:
    """The source that a place names.

    Args:
        spool: folder for what can be read only once (streams).
    """
    from .folder import Folder, Remote
    from .hub import Hub, Stream
    from .table import Table

    kind = where.type.name
    if kind == "table":
        return Table(where)
    if kind == "huggingface":
        return Stream(where, spool) if where.streaming else Hub(where)
    return Remote(where.path) if "://" in where.path else Folder(where.path)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def head(data: bytes) -> Header:
    """A picture's size and kind from its first bytes; pixels are not decoded.

    Raises:
        One of `UNREADABLE`.
    """
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        told = image.format != "PNG" or b"eXIf" in data or b"Raw profile type exif" in data  # else asking decodes a whole PNG
        turned = told and image.getexif().get(0x0112) in QUARTER_TURNS
        return Header((width, height) if turned else (height, width), digest(data), image.has_transparency_data)


def _upright(data: bytes) -> Image.Image:
    """The first frame, upright, 8 bits a channel."""
    upright: Image.Image = Image.open(io.BytesIO(data))
    upright.load()
    ImageOps.exif_transpose(upright, in_place=True)  # without a copy: large photos are mostly copying
    if upright.mode.startswith("I") or upright.mode == "F":
        values = np.asarray(upright, dtype=np.float64)
        top = 1.0 if upright.mode == "F" and values.max(initial=0) <= 1 else 255.0
        top = 65535.0 if values.max(initial=0) > 255 or upright.mode.startswith("I;16") else top
        upright = Image.fromarray(np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8))
    return upright


def decode(data: bytes) -> Tensor:
    """Pixels [3 H W] uint8, upright; transparent parts become white.

    Raises:
        One of `UNREADABLE`: the file is truncated or not a picture.
    """
    upright = _upright(data)
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    upright = upright if upright.mode == "RGB" else upright.convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def decode_mask(data: bytes, alpha: bool) -> Tensor:
    """A mask [1 H W] uint8, upright: the picture's brightness, or its alpha channel (all 255 where it has none)."""
    upright = _upright(data)
    if alpha:
        mask = upright.convert("RGBA").getchannel("A")
    elif upright.has_transparency_data:
        upright = upright.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright).convert("L")
    else:
        mask = upright.convert("L")
    return torch.from_numpy(np.array(mask))[None]
