"""The runs of a comparison: their configurations and metrics. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

from yaml import YAMLError

from .. import sweep
from ..config import ConfigError
from ..runfolder import FLOPS, RunFolder

SEED = "seed"
TRAIN_LOSS = "train/loss"  # prefix of the names of training losses
EVAL_LOSS = "eval/loss"
LOWEST, LOWEST_STEP = "eval/lowest_loss", "eval/step_of_lowest_loss"  # computed from it
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


def read(places: Iterable[Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """The finished runs at or below some folders, in the order of their jobs; and those that can't be compared, with the reason.

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
    return found, absent


def flat(values: Any, prefix: str = "") -> Values:
    """A configuration's values by dotted key."""
    if not isinstance(values, Mapping):
        return {prefix.rstrip("."): values}
    return {key: leaf for name, child in values.items() for key, leaf in flat(child, f"{prefix}{name}.").items()}


def final(name: str, series: Series) -> float:
    """A metric at the end of a run."""
    last = series[-max(len(series) // LAST, 1) :] if name.startswith(TRAIN_LOSS) else series[-1:]
    return sum(value for _, value in last) / len(last)


def run_of(folder: RunFolder) -> Run:
    """Read a run from its folder, whether it has finished or not."""
    series: dict[str, Series] = {}
    for step, name, value in folder.read_metrics():
        series.setdefault(name, []).append((step, value))
    series |= _lowest(series.get(EVAL_LOSS, []))
    return Run(folder, flat(folder.saved_values()), series, sweep.recorded(folder))


def _lowest(losses: Series) -> dict[str, Series]:
    """Where overfitting starts: the lowest eval loss and its step, logged at the last one. Nothing for a loss evaluated once."""
    if len(losses) < 2:
        return {}
    step, value = min(losses, key=lambda point: point[1])
    return {LOWEST: [(losses[-1][0], value)], LOWEST_STEP: [(losses[-1][0], float(step))]}


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
