"""Sources of images behind one interface: list them, read the bytes of one, decode it.

A source lists items without reading them; each has a stamp that changes whenever its content may have changed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from PIL import Image

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # large photos; Pillow still refuses extreme sizes


class Item(NamedTuple):
    """One image of a listing."""

    name: str  # unique in its source, with /
    stamp: str  # equal stamps: equal bytes; "": unknown
    captions: tuple[str, ...] = ()  # from the source
    problem: str | None = None  # why it can't be read


class Source(Protocol):
    notices: list[str]  # skipped items, for one notice

    @property
    def root(self) -> str:
        """The identity of this source."""

    def items(self) -> Iterator[Item]:
        """Every image, in name order; unreadable image files have a `problem`.

        Raises:
            ConfigError: there is nothing to list.
        """

    def read(self, name: str) -> bytes:
        """The bytes of the image's file.

        Raises:
            OSError: it can't be read.
        """

    def text(self, name: str) -> str | None:
        """The content of the text file beside an image; None if there is none."""


class Header(NamedTuple):
    """The data of an image that a scan stores."""

    size: tuple[int, int]  # height, width, as shown (EXIF orientation applied)
    digest: str  # SHA-256 of the file
    alpha: bool  # has transparency
    colours: str = ""  # result of `colour.profile_status`


class Picture(NamedTuple):
    source: Source
    name: str  # unique in its source, with /
    size: tuple[int, int]  # height, width, as shown (EXIF orientation applied)
    digest: str  # SHA-256 of the file
    alpha: bool
    captions: tuple[str, ...]  # from the source
    colours: str = ""  # result of `colour.profile_status`

    @property
    def stem(self) -> str:
        return stem(self.name)


class Rejected(NamedTuple):
    name: str
    reason: str


LOCAL = "stat:"  # prefix of stamps of local files


def local_stamp(stat: os.stat_result) -> str:
    """Changes with every change of a file; unlike the mtime, the ctime can't be set by users."""
    return f"{LOCAL}{stat.st_ctime_ns}:{stat.st_mtime_ns}:{stat.st_size}:{stat.st_ino}"


def stem(name: str) -> str:
    """x/a.b.jpg → x/a.b: the common part of the names of an image, its caption and its mask."""
    return str(PurePosixPath(name).with_suffix(""))
