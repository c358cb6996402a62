"""Sizes, crops and mirrors as pure functions; heights before widths, in pixels, everywhere."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ...batch import Size
from ...config import enums
from ..spec import Shaping

HW = tuple[int, int]
MEGAPIXEL = 1e6
UNIT_EDGE = 1024  # px: an area of 1 is its square
MOST_RESIZED = 2**28  # px; the maximum size of an image between resize and crop


class Geometry(NamedTuple):
    """The transform from an image to a training image: resize, crop, mirror."""

    original: HW
    resized: HW
    crop: HW  # top, left, in the resized image
    target: HW
    mirror: bool

    def size(self) -> Size:
        """SDXL's crop conditioning: the top left corner of the crop in the resized (and mirrored) image."""
        top, left = self.crop
        if self.mirror:
            left = self.resized[1] - self.target[1] - left
        return Size(self.original, (top, left), self.target)


def edge(value: float, unit: enums.ResolutionType) -> float:
    """The edge in pixels that a resolution means: of the square of the same area, or (`pixel`) the short edge."""
    return UNIT_EDGE * value**0.5 if unit is enums.ResolutionType.area else value


def measure(size: HW, unit: enums.ResolutionType) -> float:
    """A size in the unit of `minimum` and `maximum`: short edge, megapixels, or edge of the square of the same area."""
    if unit is enums.ResolutionType.pixel:
        return min(size)
    area = size[0] * size[1]
    return area / MEGAPIXEL if unit is enums.ResolutionType.area else area**0.5


def bucket_shape(size: HW, edge: float, stride: int, max_aspect: float) -> HW:
    """The training shape of an image: area about edge², sides multiples of stride, aspect as close as possible.

    With a = width / height held within [1 / max_aspect, max_aspect]: W = round_s(edge √a), H = round_s(edge / √a).
    """
    aspect = clamp(size[1] / size[0], max_aspect)
    return _round(edge / aspect**0.5, stride), _round(edge * aspect**0.5, stride)


def short_edge_shape(size: HW, edge: float, stride: int, max_aspect: float) -> HW:
    """The same with the short edge held at `edge`, whatever the area."""
    aspect = clamp(size[1] / size[0], max_aspect)
    return _round(edge * max(1 / aspect, 1.0), stride), _round(edge * max(aspect, 1.0), stride)


def clamp(aspect: float, most: float) -> float:
    return min(max(aspect, 1 / most), most)


def _round(length: float, stride: int) -> int:
    return max(int(length / stride + 0.5), 1) * stride


def target(size: HW, rule: Shaping, stride: int, draws: tuple[float, ...] = ()) -> list[HW]:
    """The training shapes of an image: one, or several if aspects are drawn at random.

    Args:
        draws: numbers in [0, 1) that choose among `rule.aspects`.
    """
    if rule.aspect is enums.CropAspect.square:
        chosen = [1.0]
    elif rule.aspect is enums.CropAspect.closest:
        own = size[1] / size[0]
        chosen = [min(rule.aspects, key=lambda a: (max(a / own, own / a), a))]
    elif rule.aspect is enums.CropAspect.random:
        chosen = sorted({rule.aspects[int(d * len(rule.aspects))] for d in draws})
    else:
        chosen = [size[1] / size[0]]
    shape = short_edge_shape if rule.unit is enums.ResolutionType.pixel else bucket_shape
    aimed = edge(rule.resolution, rule.unit)
    return list(dict.fromkeys(shape((1, a), aimed, stride, rule.max_aspect) for a in chosen))  # type: ignore[arg-type]


def reason_against(size: HW, rule: Shaping, stride: int) -> str | None:
    """Why an image of this size can't be used; None if it can."""
    height, width = size
    if (has := measure(size, rule.unit)) < rule.minimum:
        what = {enums.ResolutionType.pixel: "short edge {:.0f} px", enums.ResolutionType.area: "area {:.3g} megapixels"}
        return what.get(rule.unit, "√area {:.0f} px").format(has) + f" < minimum_image_size={rule.minimum:g}"
    short = int((rule.minimum * MEGAPIXEL) ** 0.5 if rule.unit is enums.ResolutionType.area else rule.minimum)
    if rule.aspect is enums.CropAspect.square and min(size) < short:
        return f"short edge {min(size)} px < {short} px, which minimum_image_size={rule.minimum:g} requires for square crops"
    aspect = width / height
    if rule.least_aspect is not None and aspect < rule.least_aspect:
        return f"aspect {aspect:.3g} < minimum_aspect_ratio={rule.least_aspect:g}"
    if rule.most_aspect is not None and aspect > rule.most_aspect:
        return f"aspect {aspect:.3g} > maximum_aspect_ratio={rule.most_aspect:g}"
    for shape in target(size, rule, stride, (0.0,)):
        scale = max(shape[0] / height, shape[1] / width)
        if rule.max_upscale is not None and scale > rule.max_upscale:
            return f"it would be enlarged {scale:.3g} times > max_upscale={rule.max_upscale:g}"
        if height * width * scale**2 > MOST_RESIZED:
            return f"{width}×{height} px is too narrow: covering {shape[1]}×{shape[0]} would enlarge it too much; crop it by hand"
    return None


def nearest_shape(shape: HW, shapes: list[HW]) -> HW:
    """The shape with the closest aspect, as a ratio; among equals, the closest area."""

    def distance(other: HW) -> tuple[float, int]:
        ratio = (shape[1] * other[0]) / (shape[0] * other[1])
        return max(ratio, 1 / ratio), abs(shape[0] * shape[1] - other[0] * other[1])

    return min(shapes, key=distance)


def shrunk(size: HW, rule: Shaping) -> float:
    """The factor of the first resize of an image above the maximum; 0 if no rule requires one."""
    if rule.maximum is None or rule.downsample is None or measure(size, rule.unit) <= rule.maximum:
        return 0.0
    goal = edge(rule.downsample, rule.unit)
    return goal / min(size) if rule.unit is enums.ResolutionType.pixel else goal / (size[0] * size[1]) ** 0.5


def place(size: HW, target: HW, at: tuple[float, float], mirror: bool, least: float = 0.0) -> Geometry:
    """Scale an image until it covers `target`, or by `least` if that is larger, then crop `target` from it.

    Args:
        at: (vertical, horizontal) position of the crop in its range, each in [0, 1]; (½, ½) is the centre.
    """
    scale = max(target[0] / size[0], target[1] / size[1], least)
    height, width = (max(round(side * scale), floor) for side, floor in zip(size, target, strict=True))
    crop = (round(at[0] * (height - target[0])), round(at[1] * (width - target[1])))
    return Geometry(size, (height, width), crop, target, mirror)


def apply(geometry: Geometry, picture: Tensor) -> Tensor:
    """Resize (bicubic, antialiased), crop and mirror an image, or its mask, [C H W] uint8 → [C h w] uint8."""
    if tuple(picture.shape[1:]) != geometry.original:
        raise ValueError(f"the image is {tuple(picture.shape[1:])}, but its geometry is for {geometry.original}")
    resized = F.interpolate(picture[None], geometry.resized, mode="bicubic", antialias=True)[0]
    (top, left), (height, width) = geometry.crop, geometry.target
    cut = resized[:, top : top + height, left : left + width]
    return cut.flip(-1) if geometry.mirror else cut
