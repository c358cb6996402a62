"""Pictures wherever they are, behind one interface: list them, read one's bytes, decode it.

A source lists items without reading them; each carries a stamp that changes whenever its content may have.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

from PIL import Image

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # large photos; Pillow refuses what is absurd


class Item(NamedTuple):
    """One picture as a listing shows it."""

    name: str  # unique in its source, with /
    stamp: str  # equal stamps: equal bytes; "" promises nothing
    captions: tuple[str, ...] = ()  # that came with it
    problem: str | None = None  # why it can't be read


class Source(Protocol):
    notices: list[str]  # what `items` left alone, said once

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
    colours: str = ""  # what `colour.profile_status` says of its profile


class Picture(NamedTuple):
    source: Source
    name: str  # unique in its source, with /
    size: tuple[int, int]  # height, width, as shown (EXIF orientation applied)
    digest: str  # SHA-256 of the file
    alpha: bool
    captions: tuple[str, ...]  # that came with it
    colours: str = ""  # what `colour.profile_status` says of its profile

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
