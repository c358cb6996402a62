"""From dataset records to entries: one picture at one shape, with its cached variants."""

from __future__ import annotations

from typing import NamedTuple

from .. import draw
from ..draw import Purpose
from . import cache, geometry
from .geometry import HW, Geometry
from .source import Picture, Rejected, scan
from .spec import DatasetSpec

CENTRE = (0.5, 0.5)


class Entry(NamedTuple):
    """One picture of one dataset at one shape."""

    spec: DatasetSpec
    picture: Picture
    shape: HW
    variants: tuple[Geometry, ...]  # crops, each once mirrored if the dataset says so

    def keys(self, encoder: str) -> tuple[str, ...]:
        """Cache keys of the variants' latents under an image encoder's identity."""
        return tuple(cache.key("latents", self.picture.digest, repr(variant), encoder) for variant in self.variants)


class Collected(NamedTuple):
    entries: list[Entry]
    found: dict[str, int]  # dataset id → pictures found, usable or not
    rejected: dict[str, list[Rejected]]  # dataset id → pictures that can't be used


def collect(specs: list[DatasetSpec], stride: int) -> Collected:
    """Scan every dataset and give its pictures shapes.

    Class pictures take the nearest of the shapes that the subject's photos have at their resolution, and a shape that
    none is nearest to takes them all, so every bucket has company for its instance rows.
    """
    entries: list[Entry] = []
    found, rejected = {}, {}
    for spec in specs:
        pictures, rejected[spec.id] = scan(spec.path, spec.minimum_image_size)
        found[spec.id] = len(pictures) + len(rejected[spec.id])
        own = [(p, geometry.bucket_shape(p.size, spec.resolution, stride, spec.max_aspect)) for p in pictures]
        if spec.is_class:
            taken = {e.shape for e in entries if not e.spec.is_class and e.spec.resolution == spec.resolution}
            own = _share_shapes(own, sorted(taken)) if taken else own
        entries += [Entry(spec, picture, shape, _variants(spec, picture, shape)) for picture, shape in own]
    return Collected(entries, found, rejected)


def _share_shapes(own: list[tuple[Picture, HW]], taken: list[HW]) -> list[tuple[Picture, HW]]:
    near = [(picture, geometry.nearest_shape(shape, taken)) for picture, shape in own]
    lonely = set(taken) - {shape for _, shape in near}
    return near + [(picture, shape) for shape in sorted(lonely) for picture, _ in own]


def _variants(spec: DatasetSpec, picture: Picture, shape: HW) -> tuple[Geometry, ...]:
    """The centre crop, or crops whose places are a function of the picture's own bytes."""
    places = [CENTRE]
    if spec.crops:
        random = draw.generator(int(picture.digest[:15], 16), 0, Purpose.CROP)
        places = [tuple(random.random(2)) for _ in range(spec.crops)]
    mirrors = (False, True) if spec.mirror else (False,)
    return tuple(geometry.place(picture.size, shape, at, mirror) for at in places for mirror in mirrors)
