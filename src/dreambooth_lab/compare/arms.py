"""Runs grouped into arms: runs of one arm have the same configuration except for the seed and averaged keys. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from .. import sweep
from ..config import ConfigError
from . import runs as reading
from .runs import SEED, Run, Values


class Draw(NamedTuple):
    """What the runs of one arm differ in.

    Args:
        averaged: values of the keys that the comparison averages over, such as the subject.
    """

    seed: int
    averaged: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([f"seed {self.seed}", *self.averaged])


class Arm(NamedTuple):
    """Runs that differ only in their seed and in the keys that the comparison averages over.

    Args:
        name: the values that distinguish it from other arms, as short as possible.
        runs: by draw. Every seed has the same averaged values.
    """

    name: str
    runs: dict[Draw, Run]

    def first(self) -> Run:
        return next(iter(self.runs.values()))

    def by_seed(self) -> dict[int, list[Run]]:
        found: dict[int, list[Run]] = {}
        for draw, run in self.runs.items():
            found.setdefault(draw.seed, []).append(run)
        return found


class Study(NamedTuple):
    """The arms of a comparison.

    Args:
        arms: in the order of the runs; the first is the reference.
        differing: keys in which arms differ, other than the seed.
        averaged: keys over which each seed's runs are averaged.
        following: keys whose values differ only together with those.
        absent: runs that are not compared, and why.
        repeated: runs that repeat an arm's configuration and seed; the newest one is used.
    """

    arms: list[Arm]
    differing: list[str]
    averaged: list[str]
    following: list[str]
    absent: list[tuple[str, str]]
    repeated: list[str]

    @property
    def seeds(self) -> list[int]:
        return sorted({draw.seed for arm in self.arms for draw in arm.runs})

    @property
    def draws(self) -> list[Draw]:
        return sorted({draw for arm in self.arms for draw in arm.runs})

    @property
    def metrics(self) -> list[str]:
        """All metrics of the runs, training metrics first."""
        return sorted({name for arm in self.arms for run in arm.runs.values() for name in run.series}, key=_order)


def read(places: Iterable[Path], average: Sequence[str] = ()) -> Study:
    """The runs at or below some folders, as arms.

    Args:
        average: keys, such as dataset.subject; an arm has a run for each of their values, and each seed's metrics are averaged
            over these. The conclusions then hold for these values on average.

    Raises:
        ConfigError: a folder has no run; no run has such a key; or arms can't be matched across its values.
    """
    runs, absent = reading.read(places)
    for key in average:
        if runs and not any(key in run.values for run in runs):
            near = get_close_matches(key, runs[0].values, n=1) or ["dataset.subject"]
            raise ConfigError(f"--average is {key!r}, which is no key of these runs; use a key such as {near[0]}")
    return sort(runs, absent, average)


def sort(runs: Sequence[Run], absent: Sequence[tuple[str, str]] = (), average: Sequence[str] = ()) -> Study:
    """Group runs into arms."""
    parts = _parts(runs, average)
    differ = _matching(parts, average)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr([run.values.get(key) for key in differ]), []).append(run)
    for group in groups.values():
        _refuse_mixed(group, average)
    names = _names([group[0] for group in groups.values()], differ, average)
    arms = [Arm(name, {_draw(run, average): run for run in group}) for name, group in zip(names, groups.values(), strict=True)]
    counted = {run.folder.root for arm in arms for run in arm.runs.values()}
    repeated = [str(run.folder.root) for run in runs if run.folder.root not in counted]
    whole, dropped = _complete(arms, list(parts), average)
    following = [key for key in _differing(runs, average) if key not in differ] if average else []
    return Study(whole, differ, list(average), following, [*absent, *dropped], repeated)


def _draw(run: Run, average: Sequence[str]) -> Draw:
    return Draw(run.seed, tuple(str(run.values.get(key)) for key in average))


def _parts(runs: Sequence[Run], average: Sequence[str]) -> dict[tuple[str, ...], list[Run]]:
    """Runs by their values of the averaged keys; all together without such keys."""
    parts: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        parts.setdefault(_draw(run, average).averaged, []).append(run)
    return parts


def _differing(runs: Sequence[Run], average: Sequence[str]) -> list[str]:
    keys = differing([run.values for run in runs])
    return [key for key in keys if key != SEED and key not in average and not aside(key)]


def _matching(parts: Mapping[tuple[str, ...], Sequence[Run]], average: Sequence[str]) -> list[str]:
    """Keys that distinguish the arms within each part and have the same values in all parts. A key such as prior.path, with a
    folder for each subject, has other values in each part. A part that is not finished has some of the values."""
    keys = dict.fromkeys(key for runs in parts.values() for key in _differing(runs, average))
    return [key for key in keys if _nested([{repr(run.values.get(key)) for run in runs} for runs in parts.values()])]


def _nested(sets: Sequence[set[str]]) -> bool:
    by_size = sorted(sets, key=len)
    return all(small <= large for small, large in pairwise(by_size))


def _refuse_mixed(group: Sequence[Run], average: Sequence[str]) -> None:
    """Refuse runs of one arm and one part that differ in anything but the seed."""
    for runs in _parts(group, average).values():
        if keys := _differing(runs, average):
            raise ConfigError(
                f"--average is {', '.join(average)}, but runs with equal values of it differ in {', '.join(keys)}, whose values "
                f"are not the same for all; compare one value at a time, without --average: {runs[0].folder.root}"
            )


def _complete(
    arms: Sequence[Arm], parts: Sequence[tuple[str, ...]], average: Sequence[str]
) -> tuple[list[Arm], list[tuple[str, str]]]:
    """The arms without seeds that lack some averaged value, and (arm and seed, reason) of those left out."""
    dropped: list[tuple[str, str]] = []
    kept: list[Arm] = []
    for arm in arms:
        lacking = {seed: set(parts) - {draw.averaged for draw in arm.runs if draw.seed == seed} for seed in arm.by_seed()}
        values = {seed: ", ".join(sorted("/".join(value) for value in missing)) for seed, missing in lacking.items() if missing}
        reason = f"there is no run with {', '.join(average)} ="
        dropped += [(f"{arm.name}, seed {seed}", f"{reason} {text}") for seed, text in values.items()]
        runs = {draw: run for draw, run in arm.runs.items() if draw.seed not in values}
        kept += [arm._replace(runs=runs)] if runs else []
    return kept, dropped


def differing(configurations: Sequence[Values]) -> list[str]:
    """Keys whose values are not the same in all."""
    keys = dict.fromkeys(key for values in configurations for key in values)
    return [key for key in keys if len({repr(values.get(key)) for values in configurations}) > 1]


def aside(key: str) -> bool:
    """Whether a key decides where a run writes and who hears of it, not what it learns or measures."""
    return any(key == name or key.startswith(name + ".") for name in sweep.ASIDE)


def _names(firsts: Sequence[Run], differ: Sequence[str], averaged: Sequence[str]) -> list[str]:
    """A name for each arm: what a sweep set, or the values of the fewest and shortest keys that distinguish the arms."""
    lines = [_set(run.job.words, averaged) if run.job else {} for run in firsts]
    if not all(lines) or len({repr(one) for one in lines}) < len(lines):
        lines = [{key: str(run.values.get(key)) for key in _telling(firsts, differ)} for run in firsts]
    if all(len(one) == 1 for one in lines):
        return [str(next(iter(one.values()))) for one in lines]
    return [", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in one.items()) or "all runs" for one in lines]


def _set(words: Sequence[str], averaged: Sequence[str]) -> Values:
    """Key → value of a job's overrides, except the seed and the averaged keys."""
    pairs = (word.lstrip("+~").partition("=") for word in words)
    return {key: value.strip("\"'") for key, _, value in pairs if key not in (SEED, *averaged)}


def _telling(firsts: Sequence[Run], differ: Sequence[str]) -> list[str]:
    """The fewest keys that distinguish the arms, those with short values first."""
    chosen: list[str] = []
    for key in sorted(differ, key=lambda key: sum(len(str(run.values.get(key))) for run in firsts)):
        apart = [{repr([run.values.get(one) for one in keys]) for run in firsts} for keys in (chosen, [*chosen, key])]
        if len(apart[1]) > len(apart[0]):
            chosen.append(key)
    return chosen


def _order(name: str) -> tuple[int, str]:
    return (0 if name.startswith("train/") else 1 if name.startswith("eval/") else 2, name)
