"""The data of a comparison as tables: one row per run, and one row per difference; CSV and Parquet. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..storage.durable import atomic_file
from .arms import Study
from .stats import Difference

RUNS, DIFFERENCES = "compare", "differences"  # the files' stems
FIRST = ["run", "arm", "seed"]  # columns before those of keys, metrics and cost


def runs(study: Study) -> pd.DataFrame:
    """One row per run: its folder, arm and seed, the averaged and the differing keys, its final metrics, its cost."""
    rows = [
        {"run": str(run.folder.root), "arm": arm.name, "seed": draw.seed}
        | {key: _cell(run.values.get(key)) for key in [*study.averaged, *study.differing]}
        | {metric: run.metrics.get(metric) for metric in study.metrics}
        | run.cost()
        for arm in study.arms
        for draw, run in arm.runs.items()
    ]
    return pd.DataFrame(rows)


def differences(found: Sequence[Difference]) -> pd.DataFrame:
    """One row per comparison of an arm with the reference."""
    return pd.DataFrame(found, columns=Difference._fields)


def write(study: Study, found: Sequence[Difference], folder: Path) -> None:
    """Write compare and differences, each as .csv and .parquet; floats are written with all digits."""
    for stem, table in ((RUNS, runs(study)), (DIFFERENCES, differences(found))):
        with atomic_file(folder / f"{stem}.csv") as aside:
            table.to_csv(aside, index=False)
        with atomic_file(folder / f"{stem}.parquet") as aside:
            table.to_parquet(aside, index=False)


def _cell(value: object) -> str | int | float | bool | None:
    """A configuration's value for a column of one type: Parquet has no lists of mixed types."""
    return str(value) if value is not None else None
