"""A comparison's figures: differences with their intervals, and curves with bands over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ..plots import Effect, Line, chart, forest, smoothed
from .arms import Arm, Study
from .runs import TRAIN_LOSS, Run, Series
from .stats import Difference, estimate

MOST = 300  # points per line


def effects(metric: str, found: Sequence[Difference]) -> str:
    """One metric's differences from the reference."""
    caption = f"{metric}: difference of each arm from {found[0].reference}, with 95 % intervals"
    return forest(caption, [Effect(one.arm, one.mean, one.low, one.high) for one in found], f"difference of {metric}")


def curves(study: Study, metric: str) -> str:
    """One line per arm: the mean over seeds, and its 95 % interval as a band."""
    lines = [line for place, arm in enumerate(study.arms) if (line := _mean(arm, metric, place))]
    smooth = ", running mean" if metric.startswith(TRAIN_LOSS) else ""
    band = "; bands: 95 % interval of the mean" if any(line.band for line in lines) else ""
    return chart(f"{metric}{smooth}: mean over seeds{band}", lines, y=metric) if any(line.points[1:] for line in lines) else ""


def _mean(arm: Arm, metric: str, place: int) -> Line | None:
    seeds = [[dict(_series(run, metric)) for run in runs if metric in run.series] for runs in arm.by_seed().values()]
    series = [one for group in seeds for one in group]
    if not series:
        return None
    steps = sorted(set.intersection(*(set(one) for one in series)))
    steps = steps[:: max(len(steps) // MOST, 1)]
    lines = [estimate([fmean(one[step] for one in group) for group in seeds if group]) for step in steps]
    band = ([one.low for one in lines], [one.high for one in lines]) if len(seeds) > 1 else None
    return Line([(step, one.mean) for step, one in zip(steps, lines, strict=True)], arm.name, place, band=band)


def _series(run: Run, metric: str) -> Series:
    series = run.series[metric]
    return [(int(step), value) for step, value in smoothed(list(series))] if metric.startswith(TRAIN_LOSS) else series
