"""Sizes, crops and mirrors as pure functions; heights before widths, in pixels, everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..batch import Size

HW = tuple[int, int]


class Geometry(NamedTuple):
    """How a picture becomes a training picture: resize, cut out, mirror."""

    original: HW
    resized: HW
    crop: HW  # top, left, in the resized picture
    target: HW
    mirror: bool

    def size(self) -> Size:
        """What SDXL is told: where the crop begins in the resized (and mirrored) picture."""
        top, left = self.crop
        if self.mirror:
            left = self.resized[1] - self.target[1] - left
        return Size(self.original, (top, left), self.target)


def bucket_shape(size: HW, edge: int, stride: int, max_aspect: float) -> HW:
    """The shape a picture is trained at: area about edge², sides multiples of stride, aspect as near as that allows.

    With a = width / height held within [1 / max_aspect, max_aspect]: W = round_s(edge √a), H = round_s(edge / √a).
    """
    aspect = min(max(size[1] / size[0], 1 / max_aspect), max_aspect)
    return _round(edge / aspect**0.5, stride), _round(edge * aspect**0.5, stride)


def _round(length: float, stride: int) -> int:
    return max(int(length / stride + 0.5), 1) * stride


def nearest_shape(shape: HW, shapes: list[HW]) -> HW:
    """The one of `shapes` whose aspect is nearest, in ratio; of equals, the nearest in area."""

    def distance(other: HW) -> tuple[float, int]:
        ratio = (shape[1] * other[0]) / (shape[0] * other[1])
        return max(ratio, 1 / ratio), abs(shape[0] * shape[1] - other[0] * other[1])

    return min(shapes, key=distance)


def place(size: HW, target: HW, at: tuple[float, float], mirror: bool) -> Geometry:
    """Scale a picture until it just covers `target`, then cut `target` out of it.

    Args:
        at: (vertical, horizontal) position of the crop in its room, each in [0, 1]; (½, ½) is the centre.
    """
    scale = max(target[0] / size[0], target[1] / size[1])
    height, width = (max(round(side * scale), least) for side, least in zip(size, target, strict=True))
    crop = (round(at[0] * (height - target[0])), round(at[1] * (width - target[1])))
    return Geometry(size, (height, width), crop, target, mirror)


def apply(geometry: Geometry, picture: Tensor) -> Tensor:
    """Resize (bicubic, antialiased), crop and mirror a picture, or its mask, [C H W] uint8 → [C h w] uint8."""
    if tuple(picture.shape[1:]) != geometry.original:
        raise ValueError(f"picture is {tuple(picture.shape[1:])}, its geometry is for {geometry.original}")
    resized = F.interpolate(picture[None], geometry.resized, mode="bicubic", antialias=True)[0]
    (top, left), (height, width) = geometry.crop, geometry.target
    cut = resized[:, top : top + height, left : left + width]
    return cut.flip(-1) if geometry.mirror else cut
