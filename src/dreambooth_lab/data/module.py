"""The LightningDataModule: pictures and captions → caches → an endless, addressable stream of batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..batch import Batch, Text
from ..config import DatasetType, PriorKind
from ..diffusion.time import build_times
from ..models.family import Family
from ..models.judges import Photo
from . import mask, mixture, source, spec
from .assemble import Assembler
from .bank import Bank, item
from .cached import Cached
from .classes import class_folder
from .entry import Collector, Entry
from .fill import Encoder, Failed, Stores, fill_latents, fill_masks, missing
from .refusal import refuse
from .sampler import Row, Schedule
from .source import Rejected
from .spec import DatasetSpec


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
        self.stores.place(plan)
        self.encoder = Encoder(self.family, self.family.image_identity())
        self.cached = Cached(self.stores, self.encoder, self.family.text_identity())
        collected = Collector(self.family.stride, self.stores.root).collect(self.specs)
        self.found, self.rejected, self.scanned = collected.found, collected.rejected, collected.read
        self.notices += collected.notices
        entries, problems = fill_masks(self.stores, collected.entries, self.family.factor)
        refuse(self.specs, entries, self.rejected, collected.problems + problems)
        self.cached.fill_texts(self._captions(entries), self.cfg.trainer.progress)
        whole = self._fill_latents(entries)
        refuse(self.specs, whole, self.rejected, [])
        self.entries = [entry for entry in whole if not entry.spec.is_eval]
        self.held_out = [entry for entry in whole if entry.spec.is_eval]
        self.bank = self._fill_bank() if self.cfg.prior.kind is PriorKind.bank else None
        self.build = Assembler(self.cfg, self.family, self.cached, self.entries, self.bank)
        self.schedule = self._schedule(self.cfg.trainer.devices)
        self.stores.save_seals()

    def _captions(self, entries: list[Entry]) -> set[str]:
        """Everything that is said in the run."""
        said = {caption for entry in entries for caption in entry.captions}
        return said | {"", self.cfg.validation.negative_prompt, *self.cfg.validation.prompts}

    def text(self, caption: str) -> Text:
        """What the base model's encoders say about a caption, one row; it was among the run's prompts."""
        return self.cached.text(caption)

    def _fill_latents(self, entries: list[Entry]) -> list[Entry]:
        """Fill the latent cache; pictures that turn out to be unreadable join the rejected."""
        self.there, self.made = dict.fromkeys(self.found, 0), dict.fromkeys(self.found, 0)
        fresh, lost = [], set()
        for entry in entries:
            lacking = missing(self.stores, entry, self.encoder)
            self.there[entry.spec.id] += len(entry.variants) - len(lacking)
            fresh += [entry] if lacking else []
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
        caption, times = self.cfg.prior.prompt, build_times(self.cfg.objective, self.family.times, self.family.shift)
        bank = Bank(self.cfg, self.family, self.stores.placed[None], caption, self.text(caption), times)
        mine = [entry for entry in self.entries if entry.spec.is_class]
        bank.fill([item(self.cached, entry, which) for entry in mine for which in range(len(entry.variants))])
        return bank

    def _schedule(self, world_size: int) -> Schedule:
        buckets = mixture.buckets(self.entries, self.cfg.prior.share)
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

    def photos(self) -> list[Photo]:
        """The subject's photos, upright and whole, each once, with their masks."""
        own = (entry for entry in self.entries if not entry.spec.is_class)
        unique = {(entry.picture.source.root, entry.picture.name): entry for entry in own}.values()
        return [Photo(_image(source.decode(e.picture.source.read(e.picture.name))), _mask_of(e)) for e in unique]

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


class Samples(IterableDataset[Batch]):
    """Batches from number `start` on, this rank's rows of each."""

    def __init__(self, data: DreamBoothData, schedule: Schedule, start: int, rank: int, world_size: int):
        self.data, self.schedule, self.start = data, schedule, start
        self.rank, self.world_size = rank, world_size
        self.together: int = data.cfg.trainer.accumulate_grad_batches
        self.parts = self.together * world_size  # of an optimiser step

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()  # batch n is worker n's, modulo their number: the loader takes turns, so order stays
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in count(self.start + first, stride):
            rows = self.schedule.batch(number)[self.rank :: self.world_size]
            yield self.data.build(rows, self.data.build.kinds(self._step(number), self.parts))

    def _step(self, number: int) -> list[Row]:
        """All rows of the optimiser step to which a batch belongs."""
        first = number - number % self.together
        return [row for n in range(first, first + self.together) for row in self.schedule.batch(n)]


def _image(pixels: Tensor) -> Image.Image:
    """[3 H W] or [1 H W] uint8."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())


def _mask_of(entry: Entry) -> Image.Image | None:
    return _image(mask.load(entry.mask, entry.picture)) if entry.mask else None


def _as_it_is(batch: Any) -> Any:
    return batch
