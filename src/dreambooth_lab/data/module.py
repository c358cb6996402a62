"""The LightningDataModule: images and captions → caches → an endless, indexable stream of batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..batch import Batch, Caption, Text
from ..config import class_prompt_of, enums, processes
from ..diffusion.time import build_times
from ..models.family import Family
from ..models.feature_extractors import Photo
from . import gallery, planning
from .caching.bank import Bank, item
from .caching.fill import Encoder, Failed, Stores, fill_latents, fill_masks, missing, require_free_space
from .caching.reader import CacheReader
from .class_images import class_folder
from .preparation import mask, notices
from .preparation.entry import Collector, Entry
from .preparation.problems import raise_problems
from .sampling import mixture
from .sampling.assemble import Assembler
from .sampling.schedule import Schedule
from .sources import decode
from .sources.base import Rejected
from .spec import DatasetSpec


class Summary(NamedTuple):
    """Counts of one dataset."""

    spec: DatasetSpec
    found: int
    rejected: list[Rejected]
    cached: int  # latents that were already cached
    built: int
    buckets: int
    masks: int


class DreamBoothData(LightningDataModule):
    """The data of a run.

    `prepare` scans and fills the caches (it needs the family's encoders); after it, `text`, `summaries` and the loader
    read caches only.
    """

    def __init__(self, cfg: DictConfig, family: Family):
        super().__init__()
        self.cfg, self.family = cfg, family
        self.stores = Stores(Path(cfg.cache).expanduser())
        self.start = 0  # number of the next batch

    def prepare(self) -> None:
        """Scan the datasets, fill the caches, build the buckets.

        Raises:
            ConfigError: lists all problems: datasets without a usable image, missing captions, masks.
        """
        if self.cfg.dataset.long_captions is enums.LongCaptions.chunk:
            self.family.fit_chunks([])  # refused before anything is read
        from_file = self.cfg.dataset.type is enums.DatasetType.simpletuner
        plan = planning.plan(self.cfg, None if from_file else class_folder(self.cfg, self.family))
        self.specs, self.notices = plan.specs, list(plan.notices)
        self.stores.place(plan)
        self.encoder = Encoder(self.family, self.family.image_identity())
        collected = Collector(self.family.stride, self.stores.root).collect(self.specs)
        self.found, self.rejected, self.scanned = collected.found, collected.rejected, collected.read
        self.notices += collected.notices
        entries, problems = fill_masks(self.stores, collected.entries, self.family.factor)
        raise_problems(self.specs, entries, self.rejected, collected.problems + problems)
        self.gallery = gallery.read(self.cfg.eval.gallery, entries) if self.cfg.eval.gallery else None
        self._read_texts(self._captions(entries))
        self.notices += notices.notices(entries)
        whole = self._fill_latents(entries)
        raise_problems(self.specs, whole, self.rejected, [])
        self.entries = [entry for entry in whole if not entry.spec.is_eval]
        self.held_out = [entry for entry in whole if entry.spec.is_eval]
        self.bank = self._fill_bank() if self.cfg.prior.kind is enums.PriorKind.bank else None
        self.schedule = self._schedule(processes(self.cfg))
        self.build = Assembler(self.cfg, self.family, self.cache_reader, self.entries, self.bank, self.schedule.class_share)
        self.stores.save_index()

    def _read_texts(self, captions: set[Caption]) -> None:
        """Fill the text cache; truncated captions are listed, whether they were cached or not."""
        non_empty = {caption for caption in captions if caption}
        if self.cfg.dataset.long_captions is enums.LongCaptions.chunk:
            self.family.fit_chunks(non_empty)
        self.notices += self.family.truncated_part(non_empty)
        self.cache_reader = CacheReader(self.stores, self.encoder, self.family.text_identity())
        self.cache_reader.fill_texts(captions, self.cfg.trainer.progress)

    def _captions(self, entries: list[Entry]) -> set[Caption]:
        """All captions and prompts of the run."""
        message: set[Caption] = {caption for entry in entries for caption in entry.captions}
        message |= {*class_prompts(self.cfg).values()}
        if self.cfg.eval.leakage:
            message |= {without_word(self.cfg, entry.captions[0]) for entry in entries if entry.spec.is_eval} - {None}
        return message | {"", self.cfg.validation.negative_prompt or None, *self.cfg.validation.prompts}

    def text(self, caption: Caption) -> Text:
        """The base model's text embedding of a caption, one row; the caption must be one of the run's."""
        return self.cache_reader.text(caption)

    def _fill_latents(self, entries: list[Entry]) -> list[Entry]:
        """Fill the latent cache; unreadable images are added to the rejected ones."""
        self.there, self.made = dict.fromkeys(self.found, 0), dict.fromkeys(self.found, 0)
        fresh, lost = [], set()
        for entry in entries:
            lacking = missing(self.stores, entry, self.encoder)
            self.there[entry.spec.id] += len(entry.variants) - len(lacking)
            fresh += [entry] if lacking else []
        require_free_space(self.stores, fresh, self.encoder)
        for done in fill_latents(self.stores, fresh, self.encoder, self.cfg.trainer.progress):
            if isinstance(done, Failed):
                where = (done.entry.spec.id, done.entry.picture.name)
                if where not in lost:
                    self.rejected[where[0]].append(Rejected(where[1], done.reason))
                lost.add(where)
            else:
                self.made[done.entry.spec.id] += done.variants
        self.family.release_encoders()
        return [e for e in entries if (e.spec.id, e.picture.name) not in lost]

    def _fill_bank(self) -> Bank:
        times = build_times(self.cfg.objective, self.family.times, self.family.shift)
        bank = Bank(self.cfg, self.family, self.stores.placed[None], self.text, times)
        mine = [(entry, said) for entry in self.entries if entry.spec.is_class for said in entry.captions]
        bank.fill([item(self.cache_reader, one, which, said) for one, said in mine for which in range(len(one.variants))])
        return bank

    def _schedule(self, world_size: int) -> Schedule:
        buckets = mixture.buckets(self.entries, self.cfg.prior.class_fraction)
        return Schedule(buckets, self.cfg.dataset.batch_size * world_size, self.cfg.seed)

    def summaries(self) -> list[Summary]:
        made = []
        for one in self.specs:
            own = [entry for entry in (*self.entries, *self.held_out) if entry.spec.id == one.id]
            masks = len({entry.picture.name for entry in own if entry.mask})
            shapes = len({entry.shape for entry in own})
            of = one.id
            made.append(Summary(one, self.found[of], self.rejected[of], self.there[of], self.made[of], shapes, masks))
        return made

    def croppings(self) -> dict[str, notices.Cropping]:
        """Dataset id → the area that crops remove."""
        every = [*self.entries, *self.held_out]
        return {one.id: notices.cropping(own) for one in self.specs if (own := [e for e in every if e.spec.id == one.id])}

    @property
    def damaged(self) -> int:
        """Number of damaged cache entries that were rebuilt."""
        return self.stores.damaged + (self.bank.targets.damaged if self.bank else 0)

    def rows_per_epoch(self) -> dict[str, float]:
        """Dataset id → its rows per epoch, by the schedule."""
        rows = dict.fromkeys(self.found, 0.0)
        for bucket in self.schedule.buckets:
            for group in bucket.groups:
                rows[self.entries[group.entries[0]].spec.id] += group.rows
        return rows

    def tags(self) -> dict[str, dict[str, int]]:
        """Dataset id → comma-separated part of a caption → number of the subject's images that have it."""
        values = {(e.spec.id, e.picture.name): e.captions for e in self.entries if not e.spec.is_class}
        found: dict[str, Counter[str]] = {}
        for (dataset, _), captions in values.items():
            tags = {tag for caption in captions for part in caption.split(",") if (tag := part.strip())}
            found.setdefault(dataset, Counter()).update(tags)
        return {dataset: dict(tags.most_common()) for dataset, tags in found.items()}

    def photos(self) -> list[Photo]:
        """The subject's photos, upright and whole, each once, with their masks."""
        return photos_of(self.entries)

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer: Any = self.trainer
        schedule = self._schedule(trainer.world_size)
        samples = Samples(self, schedule, self.start, trainer.global_rank, trainer.world_size)
        pinned = self.family.device.type == "cuda"  # copied to the device asynchronously
        return DataLoader(samples, batch_size=None, collate_fn=_as_it_is, pin_memory=pinned)

    def state_dict(self) -> dict[str, Any]:
        trainer: Any = self.trainer
        return {"batches": trainer.fit_loop.epoch_loop.batch_progress.total.processed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["batches"]


def class_prompts(cfg: DictConfig) -> dict[str, str]:
    """Validation prompt about the subject → the same about its class, if sampling takes it in."""
    if cfg.validation.superclass is enums.Superclass.none:
        return {}
    made = {prompt: without_word(cfg, prompt) for prompt in cfg.validation.prompts}
    return {prompt: about for prompt, about in made.items() if about is not None}


def without_word(cfg: DictConfig, caption: str) -> str | None:
    """A caption about the subject → the same about its class; None if it lacks the rare word."""
    return class_prompt_of(caption, cfg.dataset.instance_prompt, cfg.dataset.class_prompt, cfg.adapter.token)


def photos_of(entries: Iterable[Entry]) -> list[Photo]:
    """The subject's photos among entries, upright and whole, each once, with their masks."""
    own = (entry for entry in entries if not entry.spec.is_class)
    unique = {(entry.picture.source.root, entry.picture.name): entry for entry in own}.values()
    return [Photo(_image(decode.decode(e.picture.source.read(e.picture.name))), _mask_of(e)) for e in unique]


class Samples(IterableDataset[Batch]):
    """Batches from number `start` on, this rank's rows of each."""

    def __init__(self, data: DreamBoothData, schedule: Schedule, start: int, rank: int, world_size: int):
        self.data, self.schedule, self.start = data, schedule, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()  # worker (n mod number of workers) makes batch n: the loader alternates, so the order is kept
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in count(self.start + first, stride):
            yield self.data.build(self.schedule.batch(number)[self.rank :: self.world_size])


def _image(pixels: Tensor) -> Image.Image:
    """[3 H W] or [1 H W] uint8."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())


def _mask_of(entry: Entry) -> Image.Image | None:
    return _image(mask.load(entry.mask, entry.picture)) if entry.mask else None


def _as_it_is(batch: Any) -> Any:
    return batch
