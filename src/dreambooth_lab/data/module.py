"""The LightningDataModule: pictures and captions → caches → an endless, addressable stream of batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig
from PIL import Image
from rich.progress import track
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .. import draw
from ..batch import Batch, Text, stack_text
from ..config import ConfigError, PriorKind, RolloutKind
from ..diffusion.time import build_times
from ..draw import Purpose
from ..models.family import Family
from . import cache, choices, geometry, source
from .bank import Bank, Item
from .classes import class_folder
from .entry import Entry, collect
from .sampler import Bucket, Row, Schedule
from .source import Rejected
from .spec import DatasetSpec, specs

log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """What became of one dataset."""

    spec: DatasetSpec
    found: int
    rejected: list[Rejected]
    cached: int  # latents that were there already
    built: int


class DreamBoothData(LightningDataModule):
    """Everything about the data of a run.

    `prepare` scans and fills the caches (it needs the family's encoders); after it, `text`, `summaries` and the loader
    read caches only.
    """

    def __init__(self, cfg: DictConfig, family: Family):
        super().__init__()
        self.cfg, self.family = cfg, family
        root = Path(cfg.cache).expanduser()
        self.latents, self.texts = cache.Store(root, "latents"), cache.Store(root, "text")
        self.start = 0  # number of the first batch to come

    def prepare(self) -> None:
        """Scan the datasets, fill the caches, lay out the buckets.

        Raises:
            ConfigError: a dataset has no usable picture; lists what was rejected.
        """
        self.specs = specs(self.cfg, class_folder(self.cfg, self.family))
        self.image_identity, self.text_identity = self.family.image_identity(), self.family.text_identity()
        self._encode_texts()
        collected = collect(self.specs, self.family.stride)
        self.found, self.rejected = collected.found, collected.rejected
        self.cached = dict.fromkeys(self.found, 0)
        self.built = dict.fromkeys(self.found, 0)
        self.entries = self._encode_images(collected.entries)
        self._refuse_empty()
        self.keys = [entry.keys(self.image_identity) for entry in self.entries]
        self.bank = self._fill_bank() if self.cfg.prior.kind is PriorKind.bank else None
        self.schedule = self._schedule(world_size=1)
        self.family.release_encoders()

    def _encode_texts(self) -> None:
        captions = {spec.prompt for spec in self.specs} | {"", self.cfg.validation.negative_prompt}
        captions |= set(self.cfg.validation.prompts)
        for caption in sorted(c for c in captions if not self.texts.intact(self._text_key(c))):
            self.texts.write(self._text_key(caption), self.family.encode_text([caption])._asdict())
        self.family.release_encoders()

    def _text_key(self, caption: str) -> str:
        return cache.key("text", caption, self.text_identity)

    def text(self, caption: str) -> Text:
        """A caption's cached embedding ([1 L D], [1 P]); it was among the run's prompts."""
        return Text(**self.texts.read(self._text_key(caption)))

    def _encode_images(self, entries: list[Entry]) -> list[Entry]:
        """Fill the latent cache; pictures that turn out to be unreadable join the rejected."""
        fresh = [e for e in entries if not self._is_cached(e)]
        if fresh:
            for entry in track(fresh, "encoding pictures", disable=not self.cfg.trainer.progress):
                self._encode(entry)
        lost = {(spec, item.name) for spec, items in self.rejected.items() for item in items}
        return [e for e in entries if (e.spec.id, e.picture.name) not in lost]

    def _is_cached(self, entry: Entry) -> bool:
        there = [self.latents.intact(key) for key in entry.keys(self.image_identity)]
        self.cached[entry.spec.id] += sum(there)
        return all(there)

    def _encode(self, entry: Entry) -> None:
        try:
            pixels = source.read(entry.picture)
        except (OSError, SyntaxError, ValueError) as error:
            self.rejected[entry.spec.id].append(Rejected(entry.picture.name, f"can't be decoded: {error}"))
            return
        for variant, key in zip(entry.variants, entry.keys(self.image_identity), strict=True):
            if self.latents.intact(key):
                continue
            picture = geometry.apply(variant, pixels)[None].float() / 127.5 - 1
            mean, std = self.family.encode_image(picture)
            self.latents.write(key, {"mean": mean[0], "std": std[0]})
            self.built[entry.spec.id] += 1

    def _fill_bank(self) -> Bank:
        caption, times = self.cfg.prior.prompt, build_times(self.cfg.objective, self.family.times)
        bank = Bank(self.cfg, self.family, self.latents, caption, self.text(caption), times)
        mine = [i for i, entry in enumerate(self.entries) if entry.spec.is_class]
        bank.fill([self._item(i, which) for i in mine for which in range(len(self.entries[i].variants))])
        return bank

    def _item(self, entry: int, which: int) -> Item:
        return Item(self.keys[entry][which], self.entries[entry].variants[which].size())

    def _refuse_empty(self) -> None:
        usable = {entry.spec.id for entry in self.entries}
        for spec in self.specs:
            if spec.id not in usable:
                reasons = "; ".join(f"{r.name}: {r.reason}" for r in self.rejected[spec.id]) or "no picture files"
                key = "prior.path" if spec.is_class else "dataset.path"
                raise ConfigError(f"{key} is {str(spec.path)!r}, which has no usable picture ({reasons})")

    def _schedule(self, world_size: int) -> Schedule:
        shapes = sorted({entry.shape for entry in self.entries if not entry.spec.is_class})
        where = [(i, entry.shape, entry.spec.is_class) for i, entry in enumerate(self.entries)]
        buckets = [
            Bucket(
                shape,
                tuple(i for i, s, is_class in where if s == shape and not is_class),
                tuple(i for i, s, is_class in where if s == shape and is_class),
            )
            for shape in shapes
        ]
        data = self.cfg.dataset
        return Schedule(buckets, data.repeats + 1, data.batch_size * world_size, self.cfg.prior.share, self.cfg.seed)

    def summaries(self) -> list[Summary]:
        return [Summary(s, self.found[s.id], self.rejected[s.id], self.cached[s.id], self.built[s.id]) for s in self.specs]

    def rows_per_epoch(self) -> dict[str, float]:
        """Dataset id → rows it gives to an epoch, as the schedule has it."""
        rows = dict.fromkeys(self.found, 0.0)
        for bucket, total, share in zip(self.schedule.buckets, self.schedule.rows, self.schedule.shares, strict=True):
            for entries, part in ((bucket.instances, 1 - share), (bucket.classes, share)):
                for i in entries:
                    rows[self.entries[i].spec.id] += total * part / len(entries)
        return rows

    def photos(self) -> list[Image.Image]:
        """The subject's photos, upright and whole, each once."""
        unique = {entry.picture.path: entry.picture for entry in self.entries if not entry.spec.is_class}
        return [Image.fromarray(source.read(picture).permute(1, 2, 0).numpy()) for picture in unique.values()]

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer: Any = self.trainer
        schedule = self._schedule(trainer.world_size)
        samples = Samples(self, schedule, self.start, trainer.global_rank, trainer.world_size)
        return DataLoader(samples, batch_size=None, collate_fn=_as_it_is)

    def state_dict(self) -> dict[str, Any]:
        trainer: Any = self.trainer
        return {"batches": trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["batches"]

    def build(self, rows: list[Row]) -> Batch:
        """Rows of one shape with all their draws; nothing random happens after this."""
        seed = self.cfg.seed
        entries = [self.entries[row.entry] for row in rows]
        captions = tuple(self._caption(row, entry) for row, entry in zip(rows, entries, strict=True))
        samples = [row.sample for row in rows]
        posteriors, sizes = [], []
        keyed, times, taught = [], [], []  # what x_0, ε and t are drawn by: the sample, or a fixed draw of the bank
        for row, entry in zip(rows, entries, strict=True):
            which = int(draw.uniform(seed, row.sample, Purpose.VARIANT) * len(entry.variants))
            posteriors.append(self.latents.read(self.keys[row.entry][which]))
            sizes.append(entry.variants[which].size())
            if self.bank and entry.spec.is_class:
                item, number = self._item(row.entry, which), self.bank.pick(row.sample)
                keyed.append(self.bank.index(item, number))
                times.append(self.bank.u(item, number))
                taught.append(self.bank.read(item, number))
            else:
                keyed.append(row.sample)
                times.append(draw.uniform(seed, row.sample, Purpose.TIME))
        mean = torch.stack([p["mean"] for p in posteriors])
        shape = tuple(mean.shape[1:])

        def normal(purpose: Purpose, indices: list[int]) -> torch.Tensor:
            return torch.stack([draw.normal(seed, index, purpose, shape) for index in indices])

        perturbed = self.cfg.rollout.enabled and self.cfg.rollout.kind is RolloutKind.input_perturbation
        is_class = torch.tensor([entry.spec.is_class for entry in entries])
        return Batch(
            sample=torch.tensor(samples),
            mean=mean,
            std=torch.stack([p["std"] for p in posteriors]),
            z=normal(Purpose.POSTERIOR, keyed),
            eps=torch.stack([choices.noise(self.cfg, index, shape) for index in keyed]),
            u=torch.tensor(times, dtype=torch.float64),
            walk=choices.walk(self.cfg, samples),
            xi=normal(Purpose.PERTURBATION, samples) if perturbed else None,
            cond=self.family.cond(stack_text([self.text(caption) for caption in captions]), sizes),
            captions=captions,
            instance_rows=(~is_class).nonzero()[:, 0],
            class_rows=is_class.nonzero()[:, 0],
            mask=choices.drop_masks(self.cfg, samples, None),
            taught=torch.stack(taught) if taught else None,
        )

    def _caption(self, row: Row, entry: Entry) -> str:
        """Dropped for a share of the instance rows; class rows keep theirs, which is what they preserve."""
        drop = draw.uniform(self.cfg.seed, row.sample, Purpose.CAPTION_DROPOUT) < self.cfg.dataset.caption_dropout
        return "" if drop and not entry.spec.is_class else entry.spec.prompt


class Samples(IterableDataset[Batch]):
    """Batches from number `start` on, this rank's rows of each."""

    def __init__(self, data: DreamBoothData, schedule: Schedule, start: int, rank: int, world_size: int):
        self.data, self.schedule, self.start = data, schedule, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()  # batch n is worker n's, modulo their number: the loader takes turns, so order stays
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in count(self.start + first, stride):
            yield self.data.build(self.schedule.batch(number)[self.rank :: self.world_size])


def _as_it_is(batch: Any) -> Any:
    return batch
