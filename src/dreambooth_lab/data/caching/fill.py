"""Filling the caches before step 0: text embeddings, masks, latents. Existing entries are not changed."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...batch import Caption
from ...config import ConfigError
from ...models.family import Family
from ...storage import disk
from ...terminal import track
from ..preparation import geometry, mask
from ..preparation.entry import Entry
from ..preparation.mask import BadMask
from ..sources import decode
from ..sources.decode import UNREADABLE
from ..spec import DataPlan
from . import cache

FLOAT32 = 4  # bytes
AHEAD = 4  # images decoded ahead of the encoder


class Stores:
    """The run's caches: one root, and separate folders for datasets that set them."""

    def __init__(self, root: Path):
        self.root = root
        self.texts = cache.Store(root, "text")
        self.masks = cache.Store(root, "masks")
        self.placed: dict[str | None, cache.Store] = {None: cache.Store(root, "latents")}

    def place(self, plan: DataPlan) -> None:
        """Create the stores in the configured folders.

        Raises:
            ConfigError: lists the folders that are not writable.
        """
        folders = {"cache": self.root}
        folders |= {f"{spec.id!r}: cache_dir_vae": Path(spec.latents).expanduser() for spec in plan.specs if spec.latents}
        if plan.texts:
            folders["text_embeds: cache_dir"] = Path(plan.texts).expanduser()
            self.texts = cache.Store(Path(plan.texts).expanduser(), "text")
        problems = [f"{named} is {str(folder)!r}, {why}" for named, folder in folders.items() if (why := _unwritable(folder))]
        if problems:
            raise ConfigError("\n".join(problems))

    def latents(self, entry: Entry) -> cache.Store:
        place = entry.spec.latents
        if place not in self.placed:
            self.placed[place] = cache.Store(Path(str(place)).expanduser(), "latents")
        return self.placed[place]

    def all(self) -> list[cache.Store]:
        return [self.texts, self.masks, *self.placed.values()]

    @property
    def damaged(self) -> int:
        return sum(store.damaged for store in self.all())

    def save_index(self) -> None:
        for store in self.all():
            store.save_index()


def _unwritable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"which is not writable ({error.strerror}); set another folder"


class Encoder(NamedTuple):
    """A family's image encoder with its identity."""

    family: Family
    identity: str


def fill_texts(stores: Stores, family: Family, keys: dict[Caption, str], progress: bool) -> int:
    """Encode the captions that are not cached (caption → key); returns their number."""
    fresh = [caption for caption, key in sorted(keys.items(), key=lambda item: item[0] or "") if not stores.texts.is_intact(key)]
    for caption in track(fresh, "encoding captions", hidden=not (progress and fresh)):
        stores.texts.write(keys[caption], family.encode_text([caption]))
    return len(fresh)


def fill_masks(stores: Stores, entries: list[Entry], factor: int) -> tuple[list[Entry], list[str]]:
    """Resample masks to the latent grid; crops outside their mask are removed.

    Returns:
        The entries with the remaining crops; problems of masks, each named.
    """
    kept, problems = [], []
    for entry in entries:
        try:
            entry = _with_mask(stores.masks, entry, factor)
        except BadMask as error:
            problems.append(f"{entry.spec.id}: {error}")
        kept.append(entry)
    return kept, list(dict.fromkeys(problems))


def _with_mask(store: cache.Store, entry: Entry, factor: int) -> Entry:
    if entry.mask is None:
        return entry
    keys = [entry.mask.key(variant, factor) for variant in entry.variants]
    if not all(store.is_intact(key) for key in keys):
        pixels = mask.load(entry.mask, entry.picture)
        for key, variant in zip(keys, entry.variants, strict=True):
            store.write(key, {"mask": mask.to_grid(pixels, variant, factor)})
    seeing = tuple(v for key, v in zip(keys, entry.variants, strict=True) if store.read(key)["mask"].any())
    if not seeing:
        black = f"{entry.picture.name}: its mask {entry.mask.file.name} is all black in every crop"
        raise BadMask(f"{black}; change the crop position, or use more crops")
    return entry._replace(variants=seeing)


def require_free_space(stores: Stores, entries: Iterable[Entry], encoder: Encoder) -> None:
    """Refuse latents that do not fit on their caches' disks.

    Raises:
        ConfigError: names the folder.
    """
    family, needs = encoder.family, dict[Path, float]()
    for entry in entries:
        cells = entry.shape[0] * entry.shape[1] / family.factor**2
        each = 2 * FLOAT32 * family.channels * cells  # mean and std
        folder = stores.latents(entry).folder
        needs[folder] = needs.get(folder, 0.0) + len(missing(stores, entry, encoder)) * each
    for folder, size in needs.items():
        disk.require(
            folder, {"latents": size}, "free disk space, set cache to a folder on another disk, or train on fewer images"
        )


def missing(stores: Stores, entry: Entry, encoder: Encoder) -> list[int]:
    """Variants whose latents are not cached."""
    return [i for i in range(len(entry.variants)) if not stores.latents(entry).is_intact(entry.key(i, encoder.identity))]


class Made(NamedTuple):
    entry: Entry
    variants: int  # latents encoded for it


class Failed(NamedTuple):
    entry: Entry
    reason: str


def fill_latents(stores: Stores, entries: list[Entry], encoder: Encoder, progress: bool) -> Iterator[Made | Failed]:
    """Encode the missing latents, with decoding ahead in a second thread.

    Yields:
        The result of each entry, as it is done.
    """
    wanted = track(entries, "encoding images", hidden=not (progress and entries))
    for entry, pixels in _decoded(wanted):
        if isinstance(pixels, str):
            yield Failed(entry, pixels)
        else:
            yield Made(entry, encode(stores, entry, pixels, encoder))


def encode(stores: Stores, entry: Entry, pixels: Tensor, encoder: Encoder) -> int:
    """Encode one image's missing variants; returns their number."""
    store, which = stores.latents(entry), missing(stores, entry, encoder)
    for i in which:
        picture = geometry.apply(entry.variants[i], pixels)[None].float() / 127.5 - 1
        mean, std = encoder.family.encode_image(picture)
        store.write(entry.key(i, encoder.identity), {"mean": mean[0], "std": std[0]})
    return len(which)


def rebuild(stores: Stores, entry: Entry, which: int, encoder: Encoder) -> None:
    """Rebuild a damaged entry.

    Raises:
        ConfigError: the image no longer exists.
    """
    stores.latents(entry).drop(entry.key(which, encoder.identity))
    pixels = _decode(entry)
    if isinstance(pixels, str):
        raise ConfigError(f"{entry.picture.name}: its cached latents are damaged, and the image {pixels}; restore it, and resume")
    encode(stores, entry, pixels, encoder)
    encoder.family.release_encoders()


def _decode(entry: Entry) -> Tensor | str:
    """Pixels [3 H W] uint8, or the reason why they can't be read."""
    try:
        data = entry.picture.source.read(entry.picture.name)
        if decode.digest(data) != entry.picture.digest:
            return "changed while it was being read; start again"
        return decode.decode(data)
    except UNREADABLE as error:
        return f"can't be decoded: {error}"


def _decoded(entries: Iterable[Entry]) -> Iterator[tuple[Entry, Tensor | str]]:
    """Images in order, some of them decoded ahead in another thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Entry, Future[Tensor | str]]] = deque()
        for entry in entries:
            waiting.append((entry, pool.submit(_decode, entry)))
            if len(waiting) > AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
