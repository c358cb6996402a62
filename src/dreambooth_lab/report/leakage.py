"""How much the adapter acts without its word: over the steps, and by timestep at the last one."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from ..callbacks.csv_log import CsvLog
from ..callbacks.ema import EMA, LIVE, PREFIX
from ..callbacks.leakage import LeakageRow, leakage
from ..callbacks.scores import interval
from ..config import LEAKAGE
from ..plots import Line, Series, chart
from ..runfolder import RunFolder

MEANING = (
    "Leakage is the adapter's squared effect on predictions for the class prompt, divided by that for the same captions with the "
    "rare word, at the same noise. 0: it acts on its word only, which is the aim; 1: it acts regardless of its word, so prompts "
    "about the class get the subject too. At low noise the noisy photo itself shows the subject, so an adapter is near 1 there "
    "unless the prior trains the photos under other captions (prior.source=captions or blank); what prompts generate is decided "
    "at high noise, on the right of the curve by timestep. Compare runs of similar likeness to the subject."
)  # fmt: skip


def section(folder: RunFolder, numbers: dict[str, Series]) -> tuple[str, str]:
    """Figures, and a paragraph; empty without a value."""
    found = [(kind, numbers.get(PREFIX[kind] + LEAKAGE, [])) for kind in (LIVE, EMA)]
    lines = [Line(values, kind, place) for place, (kind, values) in enumerate(found) if values]
    if not lines:
        return "", ""
    rows: list[LeakageRow] = CsvLog(folder.leakage, LeakageRow).read()
    last = [row for row in rows if row.step == rows[-1].step and row.weights == lines[0].name]
    figure = chart(f"{LEAKAGE} over steps; 0 is best, 1: as strong as with the word", lines, y=LEAKAGE, from_zero=True)
    return figure + _by_time(last), f"<p>{MEANING}</p>{_values(last)}"


def _by_time(rows: Sequence[LeakageRow]) -> str:
    """The ratio at each stratum of t."""
    strata = sorted({row.stratum for row in rows})
    ratios = [(stratum, leakage([row for row in rows if row.stratum == stratum])) for stratum in strata]
    points = [(stratum, ratio) for stratum, ratio in ratios if ratio is not None]
    caption = f"{LEAKAGE} by timestep at step {rows[-1].step:,}, from data (left) to noise (right)"
    return chart(caption, [Line(points)], x="timestep t", y=LEAKAGE, from_zero=True) if len(points) > 1 else ""


def _values(rows: Sequence[LeakageRow]) -> str:
    """The last value, with the interval of its mean over images."""
    value = leakage(rows)
    images = sorted({(row.dataset, row.image) for row in rows})
    each = [leakage([row for row in rows if (row.dataset, row.image) == image]) for image in images]
    low, high = interval([ratio for ratio in each if ratio is not None])
    if value is None:
        return ""
    spread = "" if isnan(low) else f"; mean over images, 95 % interval: {low:.3f} to {high:.3f}"
    return f"<p>{LEAKAGE} at step {rows[-1].step:,} ({rows[-1].weights}): {value:.3f}{spread}.</p>"
