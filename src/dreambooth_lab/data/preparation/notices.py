"""Notices about the images before training: areas removed by crops, enlarged images, duplicates."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from .entry import Entry

MUCH_CROPPED = 1 / 3  # share of an image that its crop may remove without a notice
MUCH_ENLARGED = 2.0  # enlargement of an image's sides without a notice


class Cropping(NamedTuple):
    """The area that the crops of a dataset remove, as shares of the images' areas."""

    mean: float
    worst: float
    much: list[tuple[str, float]]  # images that lose more than `MUCH_CROPPED`, the worst first


def cropped_share(entry: Entry) -> float:
    """The share of an image that its crop removes; the minimum, if it has several crops."""
    return min(1 - v.target[0] * v.target[1] / (v.resized[0] * v.resized[1]) for v in entry.variants)


def cropping(entries: list[Entry]) -> Cropping:
    """The removed areas of some images; at least one."""
    shares = [(entry.picture.name, cropped_share(entry)) for entry in entries]
    much = sorted((s for s in shares if s[1] > MUCH_CROPPED), key=lambda s: (-s[1], s[0]))
    return Cropping(sum(lost for _, lost in shares) / len(shares), max(lost for _, lost in shares), much)


def notices(entries: list[Entry]) -> list[str]:
    """Images that are enlarged much, and duplicates, each named."""
    return [*_enlarged(entries), *_copies(entries)]


def _enlarged(entries: list[Entry]) -> list[str]:
    values = {}
    for entry in entries:
        (height, width), (high, wide) = entry.picture.size, entry.variants[0].resized
        if (scale := max(high / height, wide / width)) > MUCH_ENLARGED:
            grows = f"{width}×{height} px is enlarged {scale:.3g} times, to {wide}×{high}"
            values[entry.spec.id, entry.picture.name] = f"{entry.spec.id}: {entry.picture.name}: {grows}"
    return list(values.values())


def _copies(entries: list[Entry]) -> list[str]:
    names: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for entry in entries:
        names[entry.spec.id, entry.picture.digest][entry.picture.name] = None
    return [
        f"{of}: {', '.join(same)} are the same image (equal bytes), which is used {len(same)} times as often"
        for (of, _), same in names.items() if len(same) > 1
    ]  # fmt: skip
