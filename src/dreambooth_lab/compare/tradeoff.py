"""Likeness against drift: how much an arm's subject resembles its photos, and how much its class does. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from ..names import of_score
from ..plots import Point, scatter
from .arms import Study
from .stats import Estimate, at_end, estimate

LIKENESS = ("gallery_evaluator", "evaluator", "gallery_dino", "dino", "clip_i")  # scores with the subject's photos
GALLERY = "gallery_"


class Place(NamedTuple):
    """An arm's place in the plot.

    Args:
        best: on the Pareto front, by means: no other arm has at least its likeness at no more drift.
    """

    arm: str
    likeness: Estimate
    drift: Estimate
    best: bool


def places(study: Study, likeness: str, drift: str) -> list[Place]:
    """Each arm that has both metrics."""
    found = [(arm.name, list(at_end(arm, likeness).values()), list(at_end(arm, drift).values())) for arm in study.arms]
    means = [(fmean(high), fmean(low)) for _, high, low in found if high and low]
    return [
        Place(name, estimate(high), estimate(low), not any(_dominates(other, (fmean(high), fmean(low))) for other in means))
        for name, high, low in found
        if high and low
    ]


def figures(study: Study) -> str:
    """A plot for each pair of metrics that at least two arms have; the empty string without one."""
    pairs = [(of_score(name), of_score(f"pres_{name.removeprefix(GALLERY)}")) for name in LIKENESS]
    return "".join(_figure(study, *pair) for pair in pairs if len(places(study, *pair)) > 1)


def _dominates(other: tuple[float, float], own: tuple[float, float]) -> bool:
    return other != own and other[0] >= own[0] and other[1] <= own[1]


def _figure(study: Study, likeness: str, drift: str) -> str:
    found = places(study, likeness, drift)
    front = ", ".join(one.arm for one in found if one.best)
    caption = (
        f"{likeness} against {drift}, means over seeds with 95 % intervals; upper left is better. "
        f"On the Pareto front, by means: {front}. Dashed: the base model."
    )
    points = [Point(one.arm, _of(one.drift), _of(one.likeness), one.best) for one in found]
    return scatter(caption, points, x=f"drift: {drift}", y=f"likeness: {likeness}", mark=_base(study, drift))


def _of(one: Estimate) -> tuple[float, float, float]:
    return one.mean, one.low, one.high


def _base(study: Study, metric: str) -> float | None:
    """The base model's value: the mean over all runs at step 0."""
    first: Sequence[float] = [
        run.series[metric][0][1]
        for arm in study.arms
        for run in arm.runs.values()
        if metric in run.series and run.series[metric][0][0] == 0
    ]
    return fmean(first) if first else None
