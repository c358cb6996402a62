"""Which picture is sample n: an endless schedule that is a function of (seed, n) alone.

Pictures of one shape form a bucket. Each bucket is an endless stream of rows: passes over its instance pictures, each pass
in a fresh order, with class rows strewn in evenly at their share. A batch is the next rows of one bucket's stream, so no
picture is dropped, none is padded, and over time each is seen equally often, whatever the batch size. Within an epoch
every bucket comes as often as it takes to show its rows once, in random order.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, floor
from typing import NamedTuple

from .. import draw
from ..draw import Purpose
from .geometry import HW


class Bucket(NamedTuple):
    """Positions of the entries of one shape."""

    shape: HW
    instances: tuple[int, ...]
    classes: tuple[int, ...]


class Row(NamedTuple):
    sample: int  # global sample index n
    entry: int


class Schedule:
    """Batches of rows by number.

    Args:
        buckets: each with at least one instance entry.
        passes: how often an epoch shows each instance entry.
        batch_size: rows of a batch, over all ranks.
        share: of class rows among all rows, in buckets that have class entries.
    """

    def __init__(self, buckets: list[Bucket], passes: int, batch_size: int, share: float, seed: int):
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.shares = [share if bucket.classes else 0.0 for bucket in buckets]
        self.rows = [passes * len(bucket.instances) / (1 - part) for bucket, part in zip(buckets, self.shares, strict=True)]
        self._order = lru_cache(maxsize=64)(self._epoch_order)
        self._shuffled = lru_cache(maxsize=4 * len(buckets) + 64)(self._permutation)

    @property
    def batches_per_epoch(self) -> float:
        """Mean number of batches in which every instance entry comes `passes` times."""
        return sum(self.rows) / self.batch_size

    def batch(self, number: int) -> list[Row]:
        epoch = self._epoch_of(number)
        bucket, ordinal = self._order(epoch)[number - self._before(epoch)]
        first = ordinal * self.batch_size
        return [
            Row(number * self.batch_size + i, self._entry(bucket, first + i)) for i in range(self.batch_size)
        ]  # fmt: skip

    def _bucket_batches(self, bucket: int, epochs: int) -> int:
        """Batches of a bucket in the first `epochs` epochs: rounded up, so every picture comes in the first."""
        return ceil(epochs * self.rows[bucket] / self.batch_size - 1e-9)

    def _before(self, epoch: int) -> int:
        return sum(self._bucket_batches(b, epoch) for b in range(len(self.buckets)))

    def _epoch_of(self, number: int) -> int:
        epoch = int(number / self.batches_per_epoch)
        while self._before(epoch) > number:
            epoch -= 1
        while self._before(epoch + 1) <= number:
            epoch += 1
        return epoch

    def _epoch_order(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, ordinal of its batch) for each batch of an epoch, buckets shuffled, ordinals ascending."""
        counts = [range(self._bucket_batches(b, epoch), self._bucket_batches(b, epoch + 1)) for b in range(len(self.buckets))]
        flat = [b for b, ordinals in enumerate(counts) for _ in ordinals]
        turns = [iter(ordinals) for ordinals in counts]
        shuffled = draw.permutation(self.seed, epoch, Purpose.BATCHES, len(flat))
        return [(flat[i], next(turns[flat[i]])) for i in shuffled]

    def _entry(self, bucket: int, position: int) -> int:
        """The entry at a position of a bucket's stream."""
        share = self.shares[bucket]
        before, after = floor(position * share + 1e-9), floor((position + 1) * share + 1e-9)
        is_class = after > before
        entries = self.buckets[bucket].classes if is_class else self.buckets[bucket].instances
        lap, place = divmod(before if is_class else position - before, len(entries))
        return entries[self._shuffled(bucket, lap, is_class)[place]]

    def _permutation(self, bucket: int, lap: int, is_class: bool) -> list[int]:
        entries = self.buckets[bucket].classes if is_class else self.buckets[bucket].instances
        index = (lap * len(self.buckets) + bucket) * 2 + is_class
        return draw.permutation(self.seed, index, Purpose.ORDER, len(entries)).tolist()
