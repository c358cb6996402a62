"""The LightningDataModule: pictures and captions → caches → an endless, addressable stream of batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .. import draw
from ..batch import Batch, Kinds, Text, stack_text
from ..config import ConfigError, DatasetType, PriorKind, RolloutKind
from ..diffusion.time import build_times
from ..draw import Purpose
from ..models.family import Family
from . import cache, choices, source, spec
from .bank import Bank, Item
from .classes import class_folder
from .entry import Collector, Entry
from .fill import Encoder, Failed, Stores, fill_latents, fill_masks, fill_texts, heal, missing
from .geometry import HW
from .sampler import Bucket, Group, Row, Schedule
from .source import Rejected
from .spec import DatasetSpec

MOST_LISTED = 40  # problems shown at once


class Summary(NamedTuple):
    """What became of one dataset."""

    spec: DatasetSpec
    found: int
    rejected: list[Rejected]
    cached: int  # latents that were there already
    built: int
    buckets: int
    masks: int


class DreamBoothData(LightningDataModule):
    """Everything about the data of a run.

    `prepare` scans and fills the caches (it needs the family's encoders); after it, `text`, `summaries` and the loader
    read caches only.
    """

    def __init__(self, cfg: DictConfig, family: Family):
        super().__init__()
        self.cfg, self.family = cfg, family
        self.stores = Stores(Path(cfg.cache).expanduser())
        self.start = 0  # number of the first batch to come

    def prepare(self) -> None:
        """Scan the datasets, fill the caches, lay out the buckets.

        Raises:
            ConfigError: lists everything that must be mended: datasets without a usable picture, missing captions, masks.
        """
        from_file = self.cfg.dataset.type is DatasetType.simpletuner
        plan = spec.plan(self.cfg, None if from_file else class_folder(self.cfg, self.family))
        self.specs, self.notices = plan.specs, list(plan.notices)
        self.stores.place_texts(plan.texts)
        self.encoder = Encoder(self.family, self.family.image_identity())
        self.text_identity = self.family.text_identity()
        collected = Collector(self.family.stride, self.stores.root).collect(self.specs)
        self.found, self.rejected, self.scanned = collected.found, collected.rejected, collected.read
        self.notices += collected.notices
        entries, problems = fill_masks(self.stores, collected.entries, self.family.factor)
        self._refuse(collected.problems + problems, entries)
        self._fill_texts(entries)
        self.entries = self._fill_latents(entries)
        self._refuse([], self.entries)
        count = [range(len(entry.variants)) for entry in self.entries]
        self.keys = [[e.key(i, self.encoder.identity) for i in n] for e, n in zip(self.entries, count, strict=True)]
        self.bank = self._fill_bank() if self.cfg.prior.kind is PriorKind.bank else None
        self.schedule = self._schedule(world_size=1)
        self.stores.save_seals()

    def _fill_texts(self, entries: list[Entry]) -> None:
        said = {caption for entry in entries for caption in entry.captions}
        said |= {"", self.cfg.validation.negative_prompt, *self.cfg.validation.prompts}
        keys = {caption: self._text_key(caption) for caption in said}
        fill_texts(self.stores, self.family, keys, self.cfg.trainer.progress)
        self.family.release_encoders()

    def _text_key(self, caption: str) -> str:
        return cache.key("text", caption, self.text_identity)

    def text(self, caption: str) -> Text:
        """A caption's cached embedding ([1 L D], [1 P]); it was among the run's prompts."""
        key = self._text_key(caption)
        try:
            return Text(**self.stores.texts.read(key))
        except cache.Damaged:
            self.stores.texts.drop(key)
            fill_texts(self.stores, self.family, {caption: key}, False)
            self.family.release_encoders()
            return Text(**self.stores.texts.read(key))

    def _fill_latents(self, entries: list[Entry]) -> list[Entry]:
        """Fill the latent cache; pictures that turn out to be unreadable join the rejected."""
        self.cached, self.built = dict.fromkeys(self.found, 0), dict.fromkeys(self.found, 0)
        fresh, lost = [], set()
        for entry in entries:
            lacking = missing(self.stores, entry, self.encoder)
            self.cached[entry.spec.id] += len(entry.variants) - len(lacking)
            fresh += [entry] if lacking else []
        for done in fill_latents(self.stores, fresh, self.encoder, self.cfg.trainer.progress):
            if isinstance(done, Failed):
                where = (done.entry.spec.id, done.entry.picture.name)
                if where not in lost:
                    self.rejected[where[0]].append(Rejected(where[1], done.reason))
                lost.add(where)
            else:
                self.built[done.entry.spec.id] += done.variants
        self.family.release_encoders()
        return [e for e in entries if (e.spec.id, e.picture.name) not in lost]

    def _fill_bank(self) -> Bank:
        caption, times = self.cfg.prior.prompt, build_times(self.cfg.objective, self.family.times)
        bank = Bank(self.cfg, self.family, self.stores.placed[None], caption, self.text(caption), times)
        mine = [i for i, entry in enumerate(self.entries) if entry.spec.is_class]
        bank.fill([self._item(i, which) for i in mine for which in range(len(self.entries[i].variants))])
        return bank

    def _item(self, entry: int, which: int) -> Item:
        return Item(self.keys[entry][which], self.entries[entry].variants[which].size())

    def _refuse(self, problems: list[str], entries: list[Entry]) -> None:
        usable = {entry.spec.id for entry in entries}
        said = list(problems)
        for one in self.specs:
            if one.id in usable or any(p.startswith((one.named, f"{one.id}:")) for p in said):
                continue
            reasons = "; ".join(f"{r.name}: {r.reason}" for r in self.rejected[one.id][:MOST_LISTED]) or "no picture files"
            if not one.is_eval:
                said.append(f"{one.named} is {one.where.path!r}, which has no usable picture ({reasons})")
        if not said and not any(entry.weight for entry in entries):
            said.append("no dataset has rows to give; set a probability above 0")
        if len(said) == 1:
            raise ConfigError(said[0])
        if said:
            more = [f"and {len(said) - MOST_LISTED} more"] if len(said) > MOST_LISTED else []
            raise ConfigError(f"{len(said)} problem(s) in the data:\n" + "\n".join(f"  - {p}" for p in said[:MOST_LISTED] + more))

    def _schedule(self, world_size: int) -> Schedule:
        together: dict[HW, dict[str, list[int]]] = {}
        for i, entry in enumerate(self.entries):
            if entry.weight > 0:
                together.setdefault(entry.shape, {}).setdefault(entry.spec.id, []).append(i)
        buckets = [Bucket(shape, self._groups(together[shape])) for shape in sorted(together)]
        return Schedule(buckets, self.cfg.dataset.batch_size * world_size, self.cfg.seed)

    def _groups(self, sets: dict[str, list[int]]) -> tuple[Group, ...]:
        """One group per dataset; where class pictures share the photos' shapes, their rows are `prior.share` of a bucket's."""
        made = [Group(tuple(own), sum(self.entries[i].weight for i in own), self.entries[own[0]].spec.is_class)
                for own in sets.values()]  # fmt: skip
        sharing = [self.entries[group.entries[0]].spec.share_shapes for group in made]
        share, theirs = self.cfg.prior.share, sum(group.rows for group in made if not group.is_class)
        together = sum(group.rows for group, shares in zip(made, sharing, strict=True) if shares)
        return tuple(
            group._replace(rows=theirs * share / (1 - share) * group.rows / together) if shares and theirs else group
            for group, shares in zip(made, sharing, strict=True)
        )

    def summaries(self) -> list[Summary]:
        made = []
        for one in self.specs:
            own = [entry for entry in self.entries if entry.spec.id == one.id]
            masks = len({entry.picture.name for entry in own if entry.mask})
            shapes = len({entry.shape for entry in own})
            of = one.id
            made.append(Summary(one, self.found[of], self.rejected[of], self.cached[of], self.built[of], shapes, masks))
        return made

    @property
    def damaged(self) -> int:
        """Cache entries that were found damaged and made again."""
        return self.stores.damaged + (self.bank.answers.damaged if self.bank else 0)

    def rows_per_epoch(self) -> dict[str, float]:
        """Dataset id → rows it gives to an epoch, as the schedule has it."""
        rows = dict.fromkeys(self.found, 0.0)
        for bucket in self.schedule.buckets:
            for group in bucket.groups:
                rows[self.entries[group.entries[0]].spec.id] += group.rows
        return rows

    def photos(self) -> list[Image.Image]:
        """The subject's photos, upright and whole, each once."""
        own = (entry.picture for entry in self.entries if not entry.spec.is_class)
        unique = {(picture.source.root, picture.name): picture for picture in own}.values()
        return [Image.fromarray(source.decode(p.source.read(p.name)).permute(1, 2, 0).numpy()) for p in unique]

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

    def kinds(self, rows: list[Row], parts: int) -> Kinds:
        """Of the rows of an optimiser step that comes in so many parts."""
        classes = sum(self.entries[row.entry].spec.is_class for row in rows)
        return Kinds((len(rows) - classes) / parts, classes / parts)

    def build(self, rows: list[Row], kinds: Kinds | None = None) -> Batch:
        """Rows of one shape with all their draws; nothing random happens after this.

        Args:
            kinds: of the whole optimiser step; None if these rows are all of it.
        """
        seed = self.cfg.seed
        entries = [self.entries[row.entry] for row in rows]
        captions = tuple(self._caption(row, entry) for row, entry in zip(rows, entries, strict=True))
        samples = [row.sample for row in rows]
        posteriors, sizes, masks = [], [], []
        keyed, times, taught = [], [], []  # what x_0, ε and t are drawn by: the sample, or a fixed draw of the bank
        for row, entry in zip(rows, entries, strict=True):
            which = int(draw.uniform(seed, row.sample, Purpose.VARIANT) * len(entry.variants))
            posteriors.append(self._posterior(entry, which))
            masks.append(self._mask(entry, which))
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
            kinds=kinds or self.kinds(rows, 1),
            mask=choices.drop_masks(self.cfg, samples, _stack_masks(masks, mean)),
            taught=torch.stack(taught) if taught else None,
        )

    def _posterior(self, entry: Entry, which: int) -> dict[str, Tensor]:
        """Cached mean and std [C h w]; a damaged entry is made again."""
        key = entry.key(which, self.encoder.identity)
        try:
            return self.stores.latents(entry).read(key)
        except cache.Damaged:
            heal(self.stores, entry, which, self.encoder)
            return self.stores.latents(entry).read(key)

    def _mask(self, entry: Entry, which: int) -> Tensor | None:
        """Cached mask [1 h w] in [0, 1]; a damaged one is made again."""
        if entry.mask is None:
            return None
        key = entry.mask.key(entry.variants[which], self.family.factor)
        try:
            return self.stores.masks.read(key)["mask"]
        except cache.Damaged:
            self.stores.masks.drop(key)
            fill_masks(self.stores, [entry], self.family.factor)
            return self.stores.masks.read(key)["mask"]

    def _caption(self, row: Row, entry: Entry) -> str:
        """One of the picture's; dropped for a share of the instance rows, while class rows keep what they preserve."""
        seed = self.cfg.seed
        if not entry.spec.is_class and draw.uniform(seed, row.sample, Purpose.CAPTION_DROPOUT) < self.cfg.dataset.caption_dropout:
            return ""
        return entry.captions[int(draw.uniform(seed, row.sample, Purpose.CAPTION) * len(entry.captions))]


def _stack_masks(masks: list[Tensor | None], like: Tensor) -> Tensor | None:
    """[B 1 h w], ones where a row has none; None if no row has one."""
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones_like(like[0, :1]) if mask is None else mask for mask in masks])


class Samples(IterableDataset[Batch]):
    """Batches from number `start` on, this rank's rows of each."""

    def __init__(self, data: DreamBoothData, schedule: Schedule, start: int, rank: int, world_size: int):
        self.data, self.schedule, self.start = data, schedule, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()  # batch n is worker n's, modulo their number: the loader takes turns, so order stays
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in count(self.start + first, stride):
            yield self.data.build(self.schedule.batch(number)[self.rank :: self.world_size], self._kinds(number))

    def _kinds(self, number: int) -> Kinds:
        """Of the optimiser step to which batch `number` belongs."""
        together = self.data.cfg.trainer.accumulate_grad_batches
        first = number - number % together
        rows = [row for n in range(first, first + together) for row in self.schedule.batch(n)]
        return self.data.kinds(rows, together * self.world_size)


def _as_it_is(batch: Any) -> Any:
    return batch
