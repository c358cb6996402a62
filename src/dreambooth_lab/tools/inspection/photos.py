"""The training data of each photo: crops and masks, made by the same code as the encoded ones, and remarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...data.preparation import geometry, mask, notices
from ...data.preparation.entry import Entry
from ...data.preparation.mask import BadMask
from ...data.sources import decode
from ...data.sources.base import Picture
from ...data.sources.colour import CONVERTED
from ...data.sources.decode import UNREADABLE

BLURRED = 25.0  # variance of the Laplacian, of levels of 255, below which a photo is reported as blurred …
ANALYSIS_SIZE = 512  # … when its longest side is at most so many px
ALIKE = 0.1  # share of the bits of their hashes in which near-duplicates may differ
HASH = 16  # the hash has HASH² bits


class Crop(NamedTuple):
    """One of a photo's crops, as it is encoded."""

    entry: Entry
    mirrored: bool
    image: Image.Image  # RGB
    mask: Image.Image | None  # L, a square of equal pixels for each latent cell: the mask as the loss gets it


class InspectedPhoto(NamedTuple):
    """One photo of a dataset."""

    picture: Picture
    image: Image.Image  # whole, upright, in sRGB
    crops: list[Crop]
    sharpness: float  # variance of the Laplacian
    hash: NDArray[np.bool_]
    problems: list[str]  # why it can't be trained on

    @property
    def captions(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(caption for crop in self.crops for caption in crop.entry.captions))

    @property
    def remarks(self) -> list[str]:
        """Remarks about the photo."""
        lines = ["colours converted from its ICC profile to sRGB"] if self.picture.colours == CONVERTED else []
        if self.picture.colours not in ("", CONVERTED):
            lines.append(f"colours not converted: its ICC profile is {self.picture.colours}")
        if self.sharpness < BLURRED:
            lines.append(f"blurred? variance of the Laplacian {self.sharpness:.3g} < {BLURRED:g}")
        return lines + list(dict.fromkeys(line for crop in self.crops for line in of_crop(crop.entry)))


def of_crop(entry: Entry) -> list[str]:
    """Remarks about a large cropped-away area or a large enlargement."""
    (height, width), (high, wide) = entry.picture.size, entry.variants[0].resized
    grows, lost = max(high / height, wide / width), notices.cropped_share(entry)
    lines = [f"small: enlarged {grows:.3g} times for {entry.shape[1]}×{entry.shape[0]}"] if grows > notices.MUCH_ENLARGED else []
    return lines + (
        [f"{lost:.0%} is removed by the crop to {entry.shape[1]}×{entry.shape[0]}"] if lost > notices.MUCH_CROPPED else []
    )


def inspect(entries: Iterable[Entry], factor: int) -> Iterator[InspectedPhoto | tuple[Picture, str]]:
    """Each photo once, with all its crops, in the entries' order; or why it can't be shown.

    Args:
        factor: pixels per latent cell.
    """
    photos: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        photos.setdefault((entry.picture.source.root, entry.picture.name), []).append(entry)
    for own in photos.values():
        picture = own[0].picture
        try:
            pixels = decode.decode(picture.source.read(picture.name))
        except UNREADABLE as error:
            yield picture, f"can't be decoded: {error}"
        else:
            yield _inspected(picture, pixels, own, factor)


def _inspected(picture: Picture, pixels: Tensor, entries: list[Entry], factor: int) -> InspectedPhoto:
    image, problems, crops = to_image(pixels), [], []
    for entry in entries:
        try:
            whole = mask.load(entry.mask, picture) if entry.mask else None
        except BadMask as error:
            problems.append(str(error))
            whole = None
        for variant in entry.variants:
            grid = None if whole is None else mask.to_grid(whole, variant, factor)
            if grid is not None and not grid.any():
                problems.append(f"a {entry.shape[1]}×{entry.shape[0]} crop is outside of its mask, and is not used")
            cells = None if grid is None else _cells(grid, factor)
            crops.append(Crop(entry, variant.mirror, to_image(geometry.apply(variant, pixels)), cells))
    return InspectedPhoto(picture, image, crops, sharpness(image), fingerprint(image), list(dict.fromkeys(problems)))


def to_image(pixels: Tensor) -> Image.Image:
    """[3 H W] or [1 H W] uint8."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())


def _cells(grid: Tensor, factor: int) -> Image.Image:
    levels = (grid * 255).round().byte()[None]
    return to_image(F.interpolate(levels, scale_factor=factor, mode="nearest")[0])


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the brightness, at a longest side of at most `ANALYSIS_SIZE` px."""
    grey = image.convert("L")
    grey.thumbnail((ANALYSIS_SIZE, ANALYSIS_SIZE), Image.Resampling.LANCZOS)
    level = np.asarray(grey, dtype=np.float64)
    if min(level.shape) < 3:
        return 0.0
    return float(np.var(4 * level[1:-1, 1:-1] - level[:-2, 1:-1] - level[2:, 1:-1] - level[1:-1, :-2] - level[1:-1, 2:]))


def fingerprint(image: Image.Image) -> NDArray[np.bool_]:
    """Whether brightness rises to the right, on a coarse grid: the same for copies in other sizes and formats."""
    grey = np.asarray(image.convert("L").resize((HASH + 1, HASH), Image.Resampling.BOX), dtype=np.int16)
    return (np.diff(grey, axis=1) > 0).ravel()


def duplicates(seen: list[InspectedPhoto]) -> list[str]:
    """Duplicate or similar photos, each pair named."""
    lines = []
    for one, other in combinations(seen, 2):
        names = f"{one.picture.name} and {other.picture.name}"
        if one.picture.digest == other.picture.digest:
            lines.append(f"{names} are duplicates: equal bytes")
        elif (apart := float(np.mean(one.hash != other.hash))) <= ALIKE:
            lines.append(f"{names} are near-duplicates: {apart:.0%} of their hashes' bits differ")
    return lines
