"""The eval loss by timestep: of the base model, the best step, the last step and its average, and their changes.

Timesteps are put into at most `BINS` bins of about equally many. Intervals are over images, not over draws: draws of one image
are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ..callbacks.csv_log import CsvLog
from ..callbacks.ema import EMA, LIVE
from ..callbacks.eval_loss import EvalRow
from ..callbacks.scores import interval
from ..plots import Line, chart
from ..runfolder import RunFolder

BINS = 10
Key = tuple[str, str, float]  # dataset, image, t: what identifies a draw at every step
Draws = dict[Key, float]  # → its loss, or its change
Groups = Mapping[float, int]  # t → its bin


class Bin(NamedTuple):
    """The draws of neighbouring timesteps."""

    low: float  # smallest t
    high: float
    middle: float  # mean t
    draws: int
    images: int
    mean: float
    interval: tuple[float, float]  # over images; NaN for fewer than three


class Curve(NamedTuple):
    """One step's losses, or changes of them."""

    name: str
    draws: Draws


def section(folder: RunFolder) -> tuple[str, str]:
    """Two figures and their table; empty without a later evaluation than the first."""
    rows = read_rows(folder)
    groups, (base, *others) = groups_of(rows), curves(rows, folder.best())
    if not others:
        return "", ""
    changes = [Curve(one.name, change(one.draws, base.draws)) for one in others]
    losses = [_line(one, groups, place) for place, one in enumerate((base, *others))]
    moved = [_line(one, groups, place) for place, one in enumerate(changes, 1) if one.draws]
    band = "; bands: 95 % interval over images" if any(line.band for line in losses) else ""
    made = chart(
        f"eval/loss by timestep, from data (left) to noise (right); {_counted(bins(base.draws, groups))}{band}", losses,
        x="timestep t", y="eval/loss (squared error)",
    )  # fmt: skip
    if moved:
        caption = f"change of eval/loss by timestep, paired draw by draw; below 0 is better than the base model{band}"
        made += chart(caption, moved, x="timestep t", y="change of eval/loss", level=0.0)
    return made, _table(base, others, changes, groups)


def read_rows(folder: RunFolder) -> list[EvalRow]:
    return CsvLog(folder.eval, EvalRow).read()


def curves(rows: Sequence[EvalRow], best: tuple[Path, int] | None) -> list[Curve]:
    """The base model's, which may be empty, then those of the live weights at the best and the last step, and of the average at
    the last step, as far as they are recorded."""
    draws: dict[tuple[str, int], Draws] = {}
    for row in rows:
        draws.setdefault((row.weights, row.step), {})[row.dataset, row.image, row.t] = row.loss
    steps = sorted({step for _, step in draws})
    first, last = (steps[0], steps[-1]) if steps else (0, 0)
    base = draws.get((LIVE, first)) or draws.get((EMA, first)) or {}
    wanted = [*([(LIVE, best[1])] if best else []), (LIVE, last), (EMA, last)]
    found = [key for key in dict.fromkeys(wanted) if key in draws and key[1] != first]
    return [Curve(f"step {first:,}", base)] + [
        Curve(f"step {step:,}" + (f", {kind}" if kind == EMA else ""), draws[kind, step]) for kind, step in found
    ]


def groups_of(rows: Sequence[EvalRow]) -> Groups:
    """Draws of one stratum (t before the shift by image size) share a bin, whatever their image's size."""
    strata = sorted({row.stratum for row in rows})
    number = {stratum: i * min(BINS, len(strata)) // len(strata) for i, stratum in enumerate(strata)}
    return {row.t: number[row.stratum] for row in rows}


def bins(draws: Draws, groups: Groups) -> dict[int, Bin]:
    """Number → the bin, from data to noise; bins without a draw are omitted."""
    inside: dict[int, Draws] = {}
    for key, value in draws.items():
        inside.setdefault(groups[key[2]], {})[key] = value
    return {number: _bin(own) for number, own in sorted(inside.items())}


def _bin(draws: Draws) -> Bin:
    by_image: dict[tuple[str, str], list[float]] = {}
    for (dataset, image, _), value in draws.items():
        by_image.setdefault((dataset, image), []).append(value)
    times, means = [t for _, _, t in draws], [fmean(values) for values in by_image.values()]
    return Bin(min(times), max(times), fmean(times), len(draws), len(means), fmean(draws.values()), interval(means))


def change(draws: Draws, base: Draws) -> Draws:
    """Differences from the base model's losses, draw by draw, of the draws that both have."""
    return {key: loss - base[key] for key, loss in draws.items() if key in base}


def _line(curve: Curve, groups: Groups, place: int) -> Line:
    found = list(bins(curve.draws, groups).values())
    band = ([one.interval[0] for one in found], [one.interval[1] for one in found])
    points = [(one.middle, one.mean) for one in found]
    return Line(points, curve.name, place, band=None if any(map(isnan, band[0])) else band)


def _counted(found: Mapping[int, Bin]) -> str:
    draws, images = sorted({one.draws for one in found.values()}), max(one.images for one in found.values())
    each = " to ".join(f"{n}" for n in dict.fromkeys((draws[0], draws[-1])))
    return f"{len(found)} bins of {each} draw{'s' * (draws[-1] > 1)} from {images} image{'s' * (images > 1)}"


def between(low: float, high: float, form: str) -> str:
    return "too few values" if isnan(low) else f"{low:{form}} to {high:{form}}"


def _table(base: Curve, others: Sequence[Curve], changes: Sequence[Curve], groups: Groups) -> str:
    """A row per bin: its draws, the base model's mean, then each later mean with its change."""
    later = [(bins(one.draws, groups), bins(moved.draws, groups)) for one, moved in zip(others, changes, strict=True)]
    head = ["t", "draws", "images", base.name]
    head += [title for one in others for title in (one.name, "change", "95 % interval")]
    rows = [_cells(one, [(means.get(i), moved.get(i)) for means, moved in later]) for i, one in bins(base.draws, groups).items()]
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr>{lines}</table>"
    return f'<details><summary>eval/loss by timestep as a table</summary><div class="wide">{table}</div></details>'


def _cells(base: Bin, later: Sequence[tuple[Bin | None, Bin | None]]) -> list[str]:
    span = " to ".join(f"{t:.3f}" for t in dict.fromkeys((base.low, base.high)))
    cells = [span, f"{base.draws}", f"{base.images}", f"{base.mean:.4g}"]
    for mean, moved in later:
        cells += [f"{mean.mean:.4g}" if mean else "–"]
        cells += [f"{moved.mean:+.3g}", between(*moved.interval, "+.3g")] if moved else ["–", "–"]
    return cells
