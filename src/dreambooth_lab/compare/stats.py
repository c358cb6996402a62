"""Statistics of arms over seeds: means with intervals, paired differences, Holm's correction. Uses scipy; imports no torch.

Intervals are Student's t at 95 %. Two arms are paired by seed: a seed fixes the order of the photos, crops, times and noise, so a
difference between two runs of one seed comes from the setting and not from the draws. Arms that share fewer than two seeds are
compared unpaired (Welch's t).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from statistics import fmean
from typing import NamedTuple

from scipy import stats

from .arms import Arm, Study
from .runs import LOWEST_STEP

LEVEL = 0.95
ALPHA = 1 - LEVEL
BY_SEED, UNPAIRED, BY_IMAGE, NOT_TOLD = "seed", "none", "image", "too few"
# Only listed. The step of the lowest loss is one of a few: seeds may agree by chance, and then have an interval of width 0.
NOT_JUDGED = ("train/lr", "clip/min", "clip/max", "clip/std", LOWEST_STEP)
PARTS = "eval/loss_"  # of the eval loss: by dataset, by time


class Estimate(NamedTuple):
    """A mean over n seeds and its interval; NaN if n is too small."""

    n: int
    mean: float
    low: float
    high: float


class Difference(NamedTuple):
    """The difference of an arm from the reference.

    Args:
        pairing: what a pair has in common.
        n: pairs; for unpaired arms the runs of the smaller one.
        p: two-sided p-value of no difference.
        p_holm: corrected over the arms compared by this metric.
        p_page: corrected over all comparisons of the page.
    """

    metric: str
    arm: str
    reference: str
    pairing: str
    n: int
    mean: float
    low: float
    high: float
    p: float
    p_holm: float = nan
    p_page: float = nan


def results(study: Study) -> list[str]:
    """Metrics for which conclusions are drawn; the others are only listed. Of metrics that are equal in every run, such as
    the loss and the instance rows' loss without class rows, one is used."""
    chosen: list[str] = []
    for metric in study.metrics:
        excluded = metric in NOT_JUDGED or metric.removeprefix("ema/").startswith(PARTS)
        if not excluded and not any(_same(study, metric, other) for other in chosen):
            chosen.append(metric)
    return chosen


def _same(study: Study, metric: str, other: str) -> bool:
    return all(run.series.get(metric) == run.series.get(other) for arm in study.arms for run in arm.runs.values())


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and its interval, of two values or more."""
    n = len(values)
    mean = sum(values) / n if n else nan
    if n < 2:
        return Estimate(n, mean, nan, nan)
    low, high = _t(stats.ttest_1samp, values, 0.0)[:2]
    return Estimate(n, mean, low, high)


def at_end(arm: Arm, metric: str) -> dict[int, float]:
    """Seed → the metric at the end of the arm's runs, their mean where a comparison averages over keys."""
    return {
        seed: fmean(run.metrics[metric] for run in runs)
        for seed, runs in arm.by_seed().items()
        if all(metric in run.series for run in runs)
    }


def differences(study: Study, metrics: Iterable[str], pictures: Mapping[tuple[str, str], Sequence[float]]) -> list[Difference]:
    """Each arm against the reference, by each metric.

    Args:
        pictures: (metric, arm) → differences image by image, for arms that have one seed in common with the reference.
    """
    reference, *others = study.arms
    found = [
        made
        for metric in metrics
        for arm in others
        if (made := _difference(metric, reference, arm, pictures.get((metric, arm.name), ())))
    ]
    return _corrected(found)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Scand. J. Statist. 6, 1979): the probability of at least one false positive is below α.
    NaN values remain NaN and are not counted."""
    order = sorted((i for i in range(len(p)) if p[i] == p[i]), key=lambda i: p[i])
    corrected, most = [nan] * len(p), 0.0
    for rank, i in enumerate(order):
        most = corrected[i] = max(most, min(1.0, (len(order) - rank) * p[i]))
    return corrected


def _difference(metric: str, reference: Arm, arm: Arm, pictures: Sequence[float]) -> Difference | None:
    ours, theirs = at_end(arm, metric), at_end(reference, metric)
    shared = sorted(ours.keys() & theirs.keys())
    who = (metric, arm.name, reference.name)
    if len(shared) > 1:
        apart = [ours[seed] - theirs[seed] for seed in shared]
        low, high, p = _t(stats.ttest_1samp, apart, 0.0)
        return Difference(*who, BY_SEED, len(shared), sum(apart) / len(apart), low, high, p)
    if min(len(ours), len(theirs)) > 1:
        low, high, p = _t(stats.ttest_ind, list(ours.values()), list(theirs.values()), equal_var=False)
        apart_by = estimate(list(ours.values())).mean - estimate(list(theirs.values())).mean
        return Difference(*who, UNPAIRED, min(len(ours), len(theirs)), apart_by, low, high, p)
    if len(pictures) > 1:
        low, high, p = _t(stats.ttest_1samp, pictures, 0.0)
        return Difference(*who, BY_IMAGE, len(pictures), sum(pictures) / len(pictures), low, high, p)
    if not (ours and theirs):
        return None
    apart_by = sum(ours.values()) / len(ours) - sum(theirs.values()) / len(theirs)
    return Difference(*who, NOT_TOLD, 1, apart_by, nan, nan, nan)


def _t(test: object, *samples: object, **options: bool) -> tuple[float, float, float]:
    """Interval and p of one of scipy's t-tests. Equal values have an interval of width 0; without any difference, p is 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about values that are all equal
        result = test(*samples, **options)  # type: ignore[operator]
        interval = result.confidence_interval(LEVEL)
    first = samples[0]
    assert isinstance(first, Sequence)
    if result.pvalue != result.pvalue and max(first) == min(first) == 0:
        return 0.0, 0.0, 1.0
    return float(interval.low), float(interval.high), float(result.pvalue)


def _corrected(found: list[Difference]) -> list[Difference]:
    whole = holm([one.p for one in found])
    made = [one._replace(p_page=p) for one, p in zip(found, whole, strict=True)]
    for metric in dict.fromkeys(one.metric for one in made):
        places = [i for i, one in enumerate(made) if one.metric == metric]
        for i, p in zip(places, holm([made[i].p for i in places]), strict=True):
            made[i] = made[i]._replace(p_holm=p)
    return made
