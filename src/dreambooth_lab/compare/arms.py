"""Runs grouped into arms: runs of one arm have the same configuration and differ in their seed. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

from yaml import YAMLError

from .. import sweep
from ..config import ConfigError
from ..runfolder import FLOPS, RunFolder

SEED = "seed"
TRAIN_LOSS = "train/loss"  # prefix of the names of training losses
LAST = 10  # a training loss is the mean over the last tenth of its steps
Values = dict[str, Any]
Series = list[tuple[int, float]]


class Run(NamedTuple):
    """A finished run.

    Args:
        values: of its configuration, by dotted key.
        series: metric → (optimiser step, value).
    """

    folder: RunFolder
    values: Values
    series: dict[str, Series]
    job: sweep.Job | None

    @property
    def seed(self) -> int:
        return int(self.values[SEED])

    @property
    def metrics(self) -> dict[str, float]:
        """The run's final metrics: the last value of each; for training losses the mean over the last tenth."""
        return {name: final(name, series) for name, series in self.series.items()}

    def cost(self) -> dict[str, float]:
        """Seconds, summed over its phases and starts, and peak memory of the process and the device in MiB.

        Starts that were killed are missing: `killed_starts` is their number. FLOPs are those of training alone.
        """
        known = self.folder.costs()
        phases = [phase for _, cost in known for phase in cost.values()]
        return {
            "seconds": sum(phase["seconds"] for phase in phases),
            "flops": self._flops(),
            "killed_starts": len(self.folder.starts()) - len(known),
            "process_peak_mib": max((phase["memory_mib"] for phase in phases), default=0),
            "device_peak_mib": max((phase["device_memory_mib"] for phase in phases), default=0),
        }

    def _flops(self) -> float:
        """Of all optimiser steps; NaN where they were not counted."""
        per_step = [start[FLOPS] for start in self.folder.starts() if FLOPS in start]
        steps = max((series[-1][0] for series in self.series.values()), default=0)
        return per_step[-1] * steps if per_step else nan


class Arm(NamedTuple):
    """Runs that differ only in their seed.

    Args:
        name: the values that distinguish it from other arms, as short as possible.
        runs: by seed.
    """

    name: str
    runs: dict[int, Run]

    def first(self) -> Run:
        return next(iter(self.runs.values()))


class Study(NamedTuple):
    """The arms of a comparison.

    Args:
        arms: in the order of the runs; the first is the reference.
        differing: keys in which arms differ, other than the seed.
        absent: runs that are not compared, and why.
        repeated: runs that repeat an arm's configuration and seed; the newest one is used.
    """

    arms: list[Arm]
    differing: list[str]
    absent: list[tuple[str, str]]
    repeated: list[str]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for arm in self.arms for seed in arm.runs})

    @property
    def metrics(self) -> list[str]:
        """All metrics of the runs, training metrics first."""
        return sorted({name for arm in self.arms for run in arm.runs.values() for name in run.series}, key=_order)


def read(places: Iterable[Path]) -> Study:
    """The runs at or below some folders.

    Raises:
        ConfigError: a folder has none.
    """
    found: list[Run] = []
    absent: list[tuple[str, str]] = []
    for place in places:
        folders = sorted({path.parent for name in ("config.yaml", "job.json") for path in Path(place).rglob(name)})
        if not folders:
            raise ConfigError(f"{str(place)!r} contains no run; give folders of runs, or of sweeps, below runs/")
        for folder in map(RunFolder, folders):
            try:
                why = _absent(folder)
                found += [] if why else [run_of(folder)]
            except (YAMLError, ValueError) as error:
                why = f"one of its files is damaged ({next(iter(str(error).splitlines()), '')})"
            if why:
                absent.append((str(folder.root), why))
    found.sort(key=lambda run: (run.job.number if run.job else 0, run.folder.starts()[0]["started"]))
    return sort(found, absent)


def sort(runs: Sequence[Run], absent: Sequence[tuple[str, str]] = ()) -> Study:
    """Group runs into arms."""
    keys = [key for key in differing([run.values for run in runs]) if not aside(key)]
    differ = [key for key in keys if key != SEED]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr([run.values.get(key) for key in differ]), []).append(run)
    names = _names([group[0] for group in groups.values()], differ)
    arms = [Arm(name, {run.seed: run for run in group}) for name, group in zip(names, groups.values(), strict=True)]
    counted = {run.folder.root for arm in arms for run in arm.runs.values()}
    return Study(arms, differ, list(absent), [str(run.folder.root) for run in runs if run.folder.root not in counted])


def flat(values: Any, prefix: str = "") -> Values:
    """A configuration's values by dotted key."""
    if not isinstance(values, Mapping):
        return {prefix.rstrip("."): values}
    return {key: leaf for name, child in values.items() for key, leaf in flat(child, f"{prefix}{name}.").items()}


def differing(configurations: Sequence[Values]) -> list[str]:
    """Keys whose values are not the same in all."""
    keys = dict.fromkeys(key for values in configurations for key in values)
    return [key for key in keys if len({repr(values.get(key)) for values in configurations}) > 1]


def final(name: str, series: Series) -> float:
    """A metric at the end of a run."""
    last = series[-max(len(series) // LAST, 1) :] if name.startswith(TRAIN_LOSS) else series[-1:]
    return sum(value for _, value in last) / len(last)


def run_of(folder: RunFolder) -> Run:
    """Read a run from its folder, whether it has finished or not."""
    series: dict[str, Series] = {}
    for step, name, value in folder.read_metrics():
        series.setdefault(name, []).append((step, value))
    return Run(folder, flat(folder.saved_values()), series, sweep.recorded(folder))


def _absent(folder: RunFolder) -> str:
    """Why a run can't be compared."""
    job = sweep.recorded(folder)
    if job and job.state == sweep.State.failed:
        return f"failed: {job.message}"
    if job and job.state == sweep.State.lost:
        return f"lost the race: {job.message}"
    if sweep.finished(folder) is None:
        return "it has not finished"
    return "" if folder.read_metrics() else "it has no metrics"


def aside(key: str) -> bool:
    """Whether a key decides where a run writes and who hears of it, not what it learns or measures."""
    return any(key == name or key.startswith(name + ".") for name in sweep.ASIDE)


def _names(firsts: Sequence[Run], differ: Sequence[str]) -> list[str]:
    """A name for each arm: what a sweep set, or the values of the fewest and shortest keys that distinguish the arms."""
    lines = [_set(run.job.words) if run.job else {} for run in firsts]
    if not all(lines) or len({repr(one) for one in lines}) < len(lines):
        lines = [{key: str(run.values.get(key)) for key in _telling(firsts, differ)} for run in firsts]
    if all(len(one) == 1 for one in lines):
        return [str(next(iter(one.values()))) for one in lines]
    return [", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in one.items()) or "all runs" for one in lines]


def _set(words: Sequence[str]) -> Values:
    """Key → value of a job's overrides, except the seed."""
    pairs = (word.lstrip("+~").partition("=") for word in words)
    return {key: value.strip("\"'") for key, _, value in pairs if key != SEED}


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
