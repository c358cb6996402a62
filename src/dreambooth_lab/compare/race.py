"""Racing: which run of a sweep has lost to the leading arm before its end. Imports no torch.

Runs of a sweep share the held-out images, times and noise of their eval losses, so two arms are paired at each evaluation: by
dataset, image and time, averaged over the seeds that both have. A run has lost when at each of the last evaluations the
Student interval of the paired difference to the leading arm lies above 0. The intervals' level is corrected (Bonferroni) for
the evaluations of a whole run and for the arms that the leader was chosen from. So the chance that a run is stopped which is no
worse, on these images, stays below 5 %. About other images or other seeds the interval says nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from scipy import stats

from .. import sweep
from ..runfolder import RunFolder
from .arms import aside
from .runs import SEED, flat
from .shared import eval_rows

ALPHA = 0.05
PAIRED_BY = ["dataset", "image", "t"]
Losses = dict[int, pd.DataFrame]  # an arm's: seed → rows of the eval loss of the live weights, as far as the run has come


class Lead(NamedTuple):
    """How far an arm is behind another at one evaluation.

    Args:
        arm: the leading arm's name.
        mean: of the paired differences; above 0 the leading arm is better.
        low: end of the corrected interval.
        high: its other end.
    """

    arm: str
    mean: float
    low: float
    high: float


def lost(folder: RunFolder, step: int, in_a_row: int, evaluations: int) -> str | None:
    """Why a job of a sweep need not go on; None while it may still win.

    Args:
        step: optimiser step of the newest evaluation.
        in_a_row: evaluations, the newest last, at each of which it must be behind.
        evaluations: of a whole run.
    """
    own, others = read(folder)
    theirs = {at for arm in others.values() for table in arm.values() for at in table["step"]}
    steps = sorted(at for at in set(_rows(folder)["step"]) & theirs if 0 < at <= step)
    leads = [lead for at in steps[-in_a_row:] if (lead := leader(own, others, at, evaluations))]
    if len(leads) < in_a_row or steps[-1] != step or any(lead.low <= 0 for lead in leads):
        return None
    last = leads[-1]
    return (
        f"behind {last.arm!r} at {in_a_row} evaluations in a row: at step {step} its eval/loss is higher by {last.mean:.3g} "
        f"[{last.low:.3g}, {last.high:.3g}]"
    )


def leader(own: Losses, others: dict[str, Losses], step: int, evaluations: int) -> Lead | None:
    """The arm that is most ahead of a run's own arm at a step, with the corrected interval; None where nothing can be paired."""
    paired = {name: found for name, arm in others.items() if len(found := _differences(own, arm, step)) > 1}
    if not paired:
        return None
    name = max(paired, key=lambda one: float(paired[one].mean()))
    values = paired[name]
    mean = float(values.mean())
    if values.std() == 0:  # the interval has no width
        return Lead(name, mean, mean, mean)
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(1 - ALPHA / (evaluations * len(paired)))
    return Lead(name, mean, float(low), float(high))


def read(folder: RunFolder) -> tuple[Losses, dict[str, Losses]]:
    """A job's own arm, and each other arm of its sweep under the words that set it."""
    mine = _setting(folder)
    own, others = {_seed(folder): _rows(folder)}, dict[str, Losses]()
    for other, job in sweep.jobs(folder.root.parent):
        if other.root == folder.root or not other.config.is_file():
            continue
        words = " ".join(word for word in job.words if not word.startswith(f"{SEED}="))
        arm = own if _setting(other) == mine else others.setdefault(words or other.root.name, {})
        arm[_seed(other)] = _rows(other)
    return own, others


def _differences(own: Losses, other: Losses, step: int) -> pd.Series:
    """Of the losses at a step, by what pairs them, averaged over the seeds that both arms have."""
    ours, theirs = (
        {seed: table[table["step"] == step].set_index(PAIRED_BY)["loss"] for seed, table in arm.items()} for arm in (own, other)
    )
    shared = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return pd.concat([pd.Series(dtype=float), *shared]).dropna().groupby(level=0).mean()


def _setting(folder: RunFolder) -> str:
    """All that an arm's runs have in common."""
    values = flat(folder.saved_values())
    return repr(sorted((key, repr(value)) for key, value in values.items() if key != SEED and not aside(key)))


def _seed(folder: RunFolder) -> int:
    return int(folder.saved_values()[SEED])


def _rows(folder: RunFolder) -> pd.DataFrame:
    if not folder.eval.is_file():
        return pd.DataFrame(columns=["step", *PAIRED_BY, "loss"])
    table = eval_rows(folder)
    return table[table["weights"] == "live"]
