"""Masks: paired with their images by relative path and stem, checked together, transformed with the images' geometry."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import cache_key
from ..sources import base, decode
from ..sources.base import Picture
from ..sources.decode import UNREADABLE
from ..sources.scan import ScanResult
from . import geometry
from .geometry import Geometry

ASPECT_TOLERANCE = 0.01  # how far the aspect of a mask of another size may be from its image's


class Mask(NamedTuple):
    """The location of one image's mask."""

    file: Picture
    alpha: bool  # it is the alpha channel of `file`

    def key(self, variant: Geometry, factor: int) -> str:
        return cache_key.key("mask", self.file.digest, str(self.alpha), repr(variant), str(factor))


class BadMask(Exception):
    """A mask can't be used; the message names it and a fix."""


class Pairs(NamedTuple):
    masks: dict[str, Mask]  # image name → its mask
    problems: list[str]
    notices: list[str]


def of_alpha(pictures: list[Picture]) -> Pairs:
    """Each image's own alpha channel."""
    opaque = [p.name for p in pictures if not p.alpha]
    problems = [
        f"{name}: has no transparency, so it has no mask; add an alpha channel, or use dataset.mask_from=files" for name in opaque
    ]
    return Pairs({p.name: Mask(p, True) for p in pictures if p.alpha}, problems, [])


def pair(pictures: list[Picture], known: set[str], masks: ScanResult, where: str) -> Pairs:
    """Masks of images: the file with the same relative path, whatever its extension.

    Args:
        known: stems of all images of the dataset, including rejected ones.
        where: the user's name of the masks' location.
    """
    by_stem: dict[str, list[Picture]] = defaultdict(list)
    for file in masks.pictures:
        by_stem[file.stem].append(file)
    broken = {base.stem(r.name): r for r in masks.rejected}
    made, problems = {}, []
    for picture in pictures:
        files = by_stem.get(picture.stem, [])
        exact = [file for file in files if file.name == picture.name] or files
        if len(exact) == 1:
            made[picture.name] = Mask(exact[0], False)
        elif exact:
            problems.append(f"{picture.name}: has {len(exact)} masks, {', '.join(f.name for f in exact)}; keep one")
        elif picture.stem in broken:
            problems.append(f"{picture.name}: its mask {broken[picture.stem].name} {broken[picture.stem].reason}")
        else:
            wanted = f"{picture.stem}.png in {where!r}"
            problems.append(f"{picture.name}: has no mask; create {wanted} (all white if none is needed)")
    extra = sorted(file.name for key, files in by_stem.items() if key not in known for file in files)
    notices = [f"masks without an image are ignored: {_some(extra)}"] if extra else []
    return Pairs(made, problems, notices)


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load(mask: Mask, picture: Picture) -> Tensor:
    """The mask at its image's size [1 H W] uint8.

    Raises:
        BadMask: it can't be read, is all black, or has another shape than its image.
    """
    try:
        data = mask.file.source.read(mask.file.name)
        pixels = decode.decode_mask(data, mask.alpha)
    except UNREADABLE as error:
        raise BadMask(f"{picture.name}: its mask {mask.file.name} can't be decoded: {error}") from error
    if decode.digest(data) != mask.file.digest:
        raise BadMask(f"{picture.name}: its mask {mask.file.name} changed while it was being read; start again")
    if not pixels.any():
        black = f"{picture.name}: its mask {mask.file.name} is all black"
        raise BadMask(f"{black}, so nothing would be trained; paint the subject white")
    own, wanted = tuple(pixels.shape[1:]), picture.size
    if own == wanted:
        return pixels
    if abs(own[1] / own[0] * wanted[0] / wanted[1] - 1) > ASPECT_TOLERANCE:
        raise BadMask(
            f"{picture.name}: its mask {mask.file.name} is {own[1]}×{own[0]} px, the image {wanted[1]}×{wanted[0]}; "
            "make it the same size"
        )
    return F.interpolate(pixels[None], wanted, mode="bilinear", antialias=True)[0]


def to_grid(pixels: Tensor, variant: Geometry, factor: int) -> Tensor:
    """The mask after its image's geometry, as means over latent cells [1 h w] in [0, 1].

    Args:
        pixels: [1 H W] uint8 at the image's size.
        factor: pixels per latent cell.
    """
    cut = geometry.apply(variant, pixels)[None].float() / 255
    return F.avg_pool2d(cut, factor)[0] if factor > 1 else cut[0]
