"""From dataset records to entries: one image at one shape, with its captions, mask and cached variants."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from ... import draw
from ...config import ConfigError, enums
from ...draw import Purpose
from .. import cache_key
from ..sources.base import Picture, Rejected
from ..sources.colour import CONVERTED
from ..sources.open import open_source
from ..sources.scan import ScanCache, ScanResult, scan
from ..spec import DatasetSpec, Where
from . import geometry, mask
from .caption import NoCaption, captions
from .geometry import HW, Geometry
from .mask import Mask

PLACES = {enums.Crop.center: (0.5, 0.5), enums.Crop.corner: (0.0, 0.0)}


class Entry(NamedTuple):
    """One image of one dataset at one shape."""

    spec: DatasetSpec
    picture: Picture
    shape: HW
    variants: tuple[Geometry, ...]  # crops, with their mirrored versions if the dataset has flip
    captions: tuple[str, ...]
    mask: Mask | None
    weight: float  # rows per epoch

    def key(self, which: int, encoder: str) -> str:
        """Cache key of a variant's latents under an image encoder's identity."""
        colours = ("in sRGB",) if self.picture.colours == CONVERTED else ()
        return cache_key.key("latents", self.picture.digest, repr(self.variants[which]), encoder, *colours)


class Collected(NamedTuple):
    entries: list[Entry]
    found: dict[str, int]  # dataset id → images found, usable or not
    rejected: dict[str, list[Rejected]]  # dataset id → images that can't be used
    read: int  # images that had to be read
    problems: list[str]  # what the user must fix
    notices: list[str]


class Collector:
    """Scans every dataset once and assigns shapes to its images.

    Args:
        stride: sides of shapes are multiples of it.
        root: the cache folder, for the results of scans.
    """

    def __init__(self, stride: int, root: Path):
        self.stride, self.root = stride, root
        self.memory = ScanCache(root / "scans")
        self.scans: dict[Where, ScanResult | ConfigError] = {}
        self.done = Collected([], {}, {}, 0, [], [])

    def collect(self, specs: list[DatasetSpec]) -> Collected:
        for spec in specs:
            scanned = self._scan(_without_masks(spec))
            self.done.found[spec.id], self.done.rejected[spec.id] = 0, []
            if isinstance(scanned, ConfigError):
                self.done.problems.append(f"{spec.named} is {scanned}")
                continue
            self.done.found[spec.id] = len(scanned.pictures) + len(scanned.rejected)
            self.done.rejected[spec.id] += scanned.rejected
            self.done.notices.extend(n for n in scanned.notices if n not in self.done.notices)
            self._add(spec, scanned, self._usable(spec, scanned.pictures))
        self.done.problems.extend(_trained_on(self.done.entries) + _as_class_too(self.done.entries))
        read = sum(s.read for s in self.scans.values() if isinstance(s, ScanResult))
        return self.done._replace(read=read, problems=list(dict.fromkeys(self.done.problems)))

    def _scan(self, where: Where) -> ScanResult | ConfigError:
        if where not in self.scans:
            try:
                self.scans[where] = scan(open_source(where, str(self.root / "spool")), self.memory)
            except ConfigError as error:
                self.scans[where] = error
        return self.scans[where]

    def _usable(self, spec: DatasetSpec, pictures: list[Picture]) -> list[Picture]:
        """The images that no rule of the dataset rejects."""
        usable, rejected = [], self.done.rejected[spec.id]
        for picture in pictures:
            reason = geometry.reason_against(picture.size, spec.shaping, self.stride)
            if reason is None:
                usable.append(picture)
            else:
                rejected.append(Rejected(picture.name, reason))
        if spec.most is None or len(usable) <= spec.most:
            return usable
        order = draw.permutation(_number(spec.id), 0, Purpose.SUBSET, len(usable)).tolist()
        chosen = set(order[: spec.most])
        rejected += [Rejected(p.name, f"exceeds the maximum of {spec.most}") for i, p in enumerate(usable) if i not in chosen]
        return [p for i, p in enumerate(usable) if i in chosen]

    def _add(self, spec: DatasetSpec, scanned: ScanResult, pictures: list[Picture]) -> None:
        masks = self._masks(spec, scanned, pictures)
        shapes = {p: geometry.target(p.size, spec.shaping, self.stride, _aspect_draws(spec, p)) for p in pictures}
        pairs = [(p, shape, len(shapes[p])) for p in pictures for shape in shapes[p]]
        if spec.share_shapes:
            resolution = (spec.shaping.resolution, spec.shaping.unit)
            theirs = [e for e in self.done.entries if not e.spec.is_class]
            taken = {e.shape for e in theirs if (e.spec.shaping.resolution, e.spec.shaping.unit) == resolution}
            pairs = _share_shapes(pairs, sorted(taken)) if taken else pairs
        for picture, shape, among in pairs:
            try:
                image_captions = captions(picture, spec.captions)
            except NoCaption as error:
                self.done.problems.append(f"{spec.id}: {picture.name}: {error}")
                continue
            weight = (spec.repeats + 1) * spec.probability / among
            variants = _variants(spec, picture, shape)[: 1 if spec.is_eval else None]
            self.done.entries.append(Entry(spec, picture, shape, variants, image_captions, masks.get(picture.name), weight))

    def _masks(self, spec: DatasetSpec, scanned: ScanResult, pictures: list[Picture]) -> dict[str, Mask]:
        if spec.masks is None:
            return {}
        if spec.masks.kind is enums.MaskFrom.alpha:
            pairs = mask.of_alpha(pictures)
        else:
            assert spec.masks.where is not None
            files = self._scan(spec.masks.where)
            if isinstance(files, ConfigError):
                self.done.problems.append(f"masks {spec.masks.id!r}: {files}")
                return {}
            known = {p.stem for p in scanned.pictures} | {mask.base.stem(r.name) for r in scanned.rejected}
            pairs = mask.pair(pictures, known, files, spec.masks.where.path)
        self.done.problems.extend(pairs.problems)
        self.done.notices.extend(n for n in pairs.notices if n not in self.done.notices)
        return pairs.masks


def _trained_on(entries: list[Entry]) -> list[str]:
    """Eval images that are also training images (equal bytes), each named."""
    seen = {e.picture.digest: f"{e.spec.id}: {e.picture.name}" for e in entries if not e.spec.is_eval}
    both = [(e, seen[e.picture.digest]) for e in entries if e.spec.is_eval and e.picture.digest in seen]
    return [f"{e.spec.named}: {e.picture.name} is also trained on ({twin}); remove it from one of them" for e, twin in both]


def _as_class_too(entries: list[Entry]) -> list[str]:
    """Class images that are also the subject's photos (equal bytes), each named; not those of `captions` and `blank`."""
    mine = {e.picture.digest: f"{e.spec.id}: {e.picture.name}" for e in entries if not (e.spec.is_class or e.spec.is_eval)}
    both = [e for e in entries if e.spec.is_class and not e.spec.recaptioned and e.picture.digest in mine]
    way_out = "remove it from one of them, or use a separate folder for class images"
    return [f"{e.spec.named}: {e.picture.name} is also the subject's ({mine[e.picture.digest]}); {way_out}" for e in both]


def _without_masks(spec: DatasetSpec) -> Where:
    """Where a dataset's images are, without a folder of masks inside it."""
    masks = spec.masks.where if spec.masks else None
    folders = (spec.where, masks) if masks else ()
    if masks is None or any(one.type is not enums.DatasetType.folder or "://" in one.path for one in folders):
        return spec.where
    photos, inside = (Path(one.path).expanduser().resolve() for one in (spec.where, masks))
    return spec.where._replace(without=str(inside)) if photos in inside.parents else spec.where


def _share_shapes(own: list[tuple[Picture, HW, int]], taken: list[HW]) -> list[tuple[Picture, HW, int]]:
    """Class images get the nearest shape of the subject's photos at their resolution; a shape without such an image
    gets all of them, so that every bucket has class rows besides its instance rows."""
    near = [(picture, geometry.nearest_shape(shape, taken), among) for picture, shape, among in own]
    lonely = set(taken) - {shape for _, shape, _ in near}
    return list(dict.fromkeys(near)) + [(picture, shape, 1) for shape in sorted(lonely) for picture, _, _ in own]


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def _aspect_draws(spec: DatasetSpec, picture: Picture) -> tuple[float, ...]:
    if spec.shaping.aspect is not enums.CropAspect.random:
        return ()
    random = draw.generator(int(picture.digest[:15], 16), 0, Purpose.ASPECT)
    return tuple(random.random(spec.shaping.variants).tolist())


def _variants(spec: DatasetSpec, picture: Picture, shape: HW) -> tuple[Geometry, ...]:
    """The one crop, or random crops, whose positions are a function of the image's bytes."""
    rule = spec.shaping
    if rule.place is enums.Crop.random:
        random = draw.generator(int(picture.digest[:15], 16), 0, Purpose.CROP)
        places = [tuple(random.random(2).tolist()) for _ in range(rule.variants)]
    else:
        places = [PLACES[rule.place]]
    least = geometry.shrunk(picture.size, rule)
    mirrors = (False, True) if rule.mirror else (False,)
    made = (geometry.place(picture.size, shape, at, mirror, least) for at in places for mirror in mirrors)
    return tuple(dict.fromkeys(made))
