"""The image of sample n: an endless schedule that is a function only of (seed, n).

Images of one shape form a bucket. In a bucket, the images of one dataset form a group with a number of rows per epoch. Each group
is an endless stream of passes over its images, each pass in a new random order. A bucket interleaves its groups' streams
evenly. A batch takes the next rows of one bucket, so no image is dropped or padded, even in small buckets,
and on average each is used as often as its dataset requires, whatever the batch size. Within an epoch every bucket provides
as many batches as are needed to use its rows once, in random order.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, floor
from typing import NamedTuple

from ... import draw
from ...draw import Purpose
from ..preparation.geometry import HW


class Group(NamedTuple):
    """Positions of one dataset's entries of one shape."""

    entries: tuple[int, ...]
    rows: float  # per epoch, above 0
    is_class: bool


class Bucket(NamedTuple):
    """All entries of one shape."""

    shape: HW
    groups: tuple[Group, ...]

    @property
    def instances(self) -> tuple[int, ...]:
        return tuple(i for group in self.groups if not group.is_class for i in group.entries)

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(i for group in self.groups if group.is_class for i in group.entries)


class Row(NamedTuple):
    sample: int  # global sample index n
    entry: int


class Schedule:
    """Batches of rows by number.

    Args:
        buckets: each with at least one group.
        batch_size: rows of a batch, over all ranks.
    """

    def __init__(self, buckets: list[Bucket], batch_size: int, seed: int):
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.rows = [sum(group.rows for group in bucket.groups) for bucket in buckets]
        self.later = [_shares([group.rows for group in bucket.groups]) for bucket in buckets]
        self.first = [sum(len(b.groups) for b in buckets[:i]) for i in range(len(buckets) + 1)]  # indices of the groups
        self._order = lru_cache(maxsize=64)(self._epoch_order)
        self._shuffled = lru_cache(maxsize=4 * self.first[-1] + 64)(self._permutation)

    @property
    def class_share(self) -> float:
        """Average fraction of class rows, from `prior.class_fraction` or from the repeats of a dataset file."""
        return sum(group.rows for bucket in self.buckets for group in bucket.groups if group.is_class) / sum(self.rows)

    @property
    def batches_per_epoch(self) -> float:
        """Mean number of batches per epoch."""
        return sum(self.rows) / self.batch_size

    def batch(self, number: int) -> list[Row]:
        epoch = self._epoch_of(number)
        bucket, ordinal = self._order(epoch)[number - self._before(epoch)]
        first = ordinal * self.batch_size
        return [Row(number * self.batch_size + i, self._entry(bucket, first + i)) for i in range(self.batch_size)]

    def _bucket_batches(self, bucket: int, epochs: int) -> int:
        """Batches of a bucket in the first `epochs` epochs: rounded up, so that every image occurs in the first."""
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
        for number, share in enumerate(self.later[bucket]):
            before, after = floor(position * share + 1e-9), floor((position + 1) * share + 1e-9)
            if after == before:  # the row belongs to this group, not to a later one
                entries = self.buckets[bucket].groups[number].entries
                lap, place = divmod(position - before, len(entries))
                return entries[self._shuffled(self.first[bucket] + number, lap, len(entries))[place]]
            position = before
        raise AssertionError("the last group has no later ones")

    def _permutation(self, group: int, lap: int, n: int) -> list[int]:
        return draw.permutation(self.seed, lap * self.first[-1] + group, Purpose.ORDER, n).tolist()


def _shares(rows: list[float]) -> list[float]:
    """For each group, the share of the later groups' rows among its own and theirs."""
    return [sum(rows[i + 1 :]) / sum(rows[i:]) for i in range(len(rows))]
