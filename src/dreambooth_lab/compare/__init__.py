"""A page that compares several runs, with its data as CSV and Parquet. Imports no torch.

compare.html                   differing keys, conclusions, curves, images, cost
compare.csv, .parquet          one row per run: arm, seed, differing keys, final metrics, cost
differences.csv, .parquet      one row per comparison: interval, p, corrected p
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import ConfigError
from ..storage import durable
from ..sweep import PAGE
from . import arms, shared, stats, tables
from .arms import Study
from .stats import Difference


def write(places: Sequence[Path], out: Path, reference: str | None = None, average: Sequence[str] = ()) -> Path | None:
    """Compare the runs at or below some folders; the page's path, or None if no run has finished.

    Args:
        out: the folder to write into.
        reference: the arm that the others are compared with, by its name or a unique part of it; None: the first.
        average: keys over which each seed's metrics are averaged (`arms.read`).

    Raises:
        ConfigError: there are no runs, no such arm, or no such key.
    """
    from .document import document

    study = led_by(arms.read(places, average), reference)
    if not study.arms:
        return None
    out.mkdir(parents=True, exist_ok=True)
    found = compared(study)
    tables.write(study, found, out)
    durable.write_text(out / PAGE, document(out.resolve().name, study, found))
    return out / PAGE


def compared(study: Study) -> list[Difference]:
    """Each arm against the first, for each metric."""
    return stats.differences(study, stats.results(study), shared.paired(study))


def led_by(study: Study, reference: str | None) -> Study:
    """With another arm as the reference."""
    if reference is None:
        return study
    found = [arm for arm in study.arms if arm.name == reference] or [arm for arm in study.arms if reference in arm.name]
    if len(found) != 1:
        names = ", ".join(repr(arm.name) for arm in study.arms) or "none"
        raise ConfigError(f"reference is {reference!r}, which matches {len(found)} arms; use one of {names}")
    return study._replace(arms=[*found, *(arm for arm in study.arms if arm is not found[0])])
