"""Scanning a source: headers and hashes of its images, cached, so that an unchanged image is read only once."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ...storage.durable import atomic_file
from .base import LOCAL, Item, Picture, Rejected, Source
from .colour import DAMAGED
from .decode import UNREADABLE, head

VERSION = 3  # of the cached records
STABLE_AFTER = 2.0  # seconds without change before a file's time stamp is trusted
SAVE_EVERY = 2000  # minimum images read between two saves; the interval doubles, so that all saves cost little more than the last


class ScanResult(NamedTuple):
    pictures: list[Picture]
    rejected: list[Rejected]
    read: int  # images that had to be read
    notices: list[str]  # skipped or unconverted files


class ScanCache:
    """Results of earlier scans: source and name → stamp and header. One file per source; a damaged file only costs a new scan.

    Args:
        folder: the folder of the files, created if absent.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, source: Source) -> Path:
        return self.folder / f"{hashlib.sha256(source.root.encode()).hexdigest()}.json"

    def load(self, source: Source) -> dict[str, list[Any]]:
        try:
            head, _, body = self._path(source).read_bytes().partition(b"\n")
            header = json.loads(head)
            whole = header["version"] == VERSION and header["sum"] == hashlib.sha256(body).hexdigest()
            return json.loads(body) if whole else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    def save(self, source: Source, pictures: dict[str, list[Any]]) -> None:
        """A header line, then the images, encoded once."""
        path, body = self._path(source), json.dumps(pictures).encode()
        head = {"version": VERSION, "root": source.root, "sum": hashlib.sha256(body).hexdigest()}
        with atomic_file(path) as aside:
            aside.write_bytes(json.dumps(head).encode() + b"\n" + body)


def scan(source: Source, memory: ScanCache) -> ScanResult:
    """All images of a source in name order, and the unusable ones, each with its reason.

    Raises:
        ConfigError: the source can't be listed.
    """
    known = memory.load(source)
    kept: dict[str, list[Any]] = {}
    pictures, rejected = [], []
    read = saved = 0
    for item in source.items():
        if item.problem:
            rejected.append(Rejected(item.name, item.problem))
            continue
        fact = known.get(item.name)
        if not item.stamp or fact is None or fact[0] != item.stamp:
            fact = [item.stamp, *_read_headers(source, item)]
            read += 1
            if read - saved >= max(SAVE_EVERY, saved):
                memory.save(source, known | kept)
                saved = read
        if _is_stable(item.stamp):
            kept[item.name] = fact
        _, height, width, digest, alpha, colours, problem = fact
        if problem:
            rejected.append(Rejected(item.name, problem))
        else:
            pictures.append(Picture(source, item.name, (height, width), digest, alpha, item.captions, colours))
    if read or kept.keys() != known.keys():
        memory.save(source, kept)
    return ScanResult(pictures, rejected, read, [*source.notices, *_unreadable_profiles(pictures)])


def _unreadable_profiles(pictures: list[Picture]) -> list[str]:
    return [
        f"{p.name}: its colour profile can't be used ({p.colours.removeprefix(DAMAGED)}), so its colours are interpreted as sRGB"
        for p in pictures if p.colours.startswith(DAMAGED)
    ]  # fmt: skip


def _read_headers(source: Source, item: Item) -> tuple[int, int, str, bool, str, str | None]:
    try:
        data = source.read(item.name)
        if not data:
            return 0, 0, "", False, "", "can't be read: the file is empty"
        header = head(data)
    except UNREADABLE as error:
        return 0, 0, "", False, "", f"can't be read: {_first_line(error)}"
    return *header.size, header.digest, header.alpha, header.colours, None


def _first_line(error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"{error} An image of more than {most:,} pixels may be a decompression bomb; downscale it with another program"
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "it is not an image of a known format" if "cannot identify image file" in text else text


def _is_stable(stamp: str) -> bool:
    """Whether a stamp can be trusted later: a local file may change again within the clock's resolution."""
    if not stamp.startswith(LOCAL):
        return bool(stamp)
    changed = int(stamp.removeprefix(LOCAL).split(":")[0]) / 1e9
    return not 0 <= time.time() - changed <= STABLE_AFTER
