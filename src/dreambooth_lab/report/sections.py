"""Sections of a run's page: conclusions, curves and tables of its metrics."""

from __future__ import annotations

from html import escape
from statistics import fmean

from ..callbacks import retrieval
from ..callbacks.ema import EMA, LIVE, PREFIX
from ..callbacks.scores import changes, interval, read_scores
from ..config import enums
from ..plots import Line, Series, chart, smoothed
from ..runfolder import RunFolder
from . import by_time, leakage
from .by_time import between

Metrics = dict[str, Series]  # name → (step, value)


def verdict(folder: RunFolder, numbers: Metrics) -> str:
    """Which step to keep, if a metric shows it, as a paragraph."""
    return f'<p class="verdict">{advice(folder, numbers)}</p>'


def advice(folder: RunFolder, numbers: Metrics) -> str:
    """The same as text, escaped for HTML."""
    checkpoint, best = folder.saved_config().checkpoint, folder.best()
    values = dict(numbers.get(checkpoint.monitor or "", []))
    if best and best[1] in values:
        prefix = _chosen(checkpoint.monitor, values, best[1], checkpoint.mode is enums.Mode.min)
        return f"{prefix} It is in {escape(folder.best_export.name)}/."
    lows = [(PREFIX[kind] + "eval/loss", dict(numbers.get(PREFIX[kind] + "eval/loss", []))) for kind in (LIVE, EMA)]
    prefix = " ".join(_lowest(name, values) for name, values in lows if values)
    return prefix or "No step is marked as best; to find it, hold out photos: eval.path=FOLDER checkpoint.monitor=eval/loss."


def _chosen(name: str, values: dict[float, float], step: int, least: bool) -> str:
    prefix = f"keep step {step:,}: {escape(name)} is {values[step]:.4g} there"
    if 0 in values:
        worse = values[step] >= values[0] if least else values[step] <= values[0]
        prefix += f", {values[0]:.4g} for the base model" + (" (which is not worse)" if worse else "")
    return f"{prefix}, {values[max(values)]:.4g} at the last step ({max(values):,})."


def _lowest(name: str, values: dict[float, float]) -> str:
    step = min(values, key=values.__getitem__)
    if step == 0:
        return f"{escape(name)} was never lower than the base model's."
    return f"{escape(name)} was lowest at step {step:,}; checkpoint.monitor={escape(name)} keeps it."


def losses(folder: RunFolder, numbers: Metrics) -> str:
    """Training losses with their running means; eval losses against the base model's."""
    best = folder.best()
    made = [
        chart(f"{name} over steps; thick: running mean", _with_mean(values), y=name, from_zero=True)
        for name, values in numbers.items()
        if name.startswith("train/loss")
    ]
    watched = [(kind, numbers.get(PREFIX[kind] + "eval/loss", [])) for kind in (LIVE, EMA)]
    lines = [Line(values, kind, place) for place, (kind, values) in enumerate(watched) if values]
    if lines:
        base = dict(lines[0].points).get(0)
        caption = "eval/loss over steps; dashed: the base model" + ("; vertical: the best step" if best else "")
        made.append(chart(caption, lines, y="eval/loss (squared error)", level=base, mark=best[1] if best else None))
    figures, table = by_time.section(folder)
    leaks, meaning = leakage.section(folder, numbers)
    return f'<div class="few">{"".join(made)}{figures}{leaks}</div>{table}{_eval_changes(folder)}{meaning}'


def _with_mean(values: Series) -> list[Line]:
    return [Line(values, "each step", faint=True), Line(smoothed(values), "running mean")]


def _eval_changes(folder: RunFolder) -> str:
    """Paired with the base model draw by draw."""
    base, *others = by_time.curves(by_time.read_rows(folder), folder.best())
    text = ""
    for one in others:
        moved = list(by_time.change(one.draws, base.draws).values())
        if moved:
            against = f"<p>eval/loss at {one.name} compared with the base model: {fmean(moved):+.4g}"
            text += f"{against} (95 % interval {between(*interval(moved), '+.4g')}).</p>"
    return text


def metrics(numbers: Metrics) -> str:
    """Every score over the steps."""
    seen = {name: values for name, values in numbers.items() if not name.startswith(("train/", "eval/", "ema/"))}
    charts = "".join(_metric(name, values, numbers) for name, values in seen.items() if len(values) > 1)
    return f'<div class="many">{charts}</div>' if charts else ""


def _metric(name: str, values: Series, numbers: Metrics) -> str:
    averaged = numbers.get(PREFIX[EMA] + name, [])
    lines = [Line(values, LIVE if averaged else ""), *([Line(averaged, EMA, 1)] if averaged else [])]
    return chart(f"{name} over steps; dashed: the base model", lines, y=name, level=dict(values).get(0))


def changed(folder: RunFolder) -> str:
    """Each metric before and after, with the 95 % interval of the paired change; also for the best step and the average."""
    scores, best = read_scores(folder), folder.best()
    tables = ""
    for weights in (LIVE, EMA):
        steps = sorted({score.step for score in scores if score.weights == weights})
        chosen = {steps[-1]} | ({best[1]} & set(steps) if best else set()) if len(steps) > 1 else set()
        for step in sorted(chosen):
            rows = "".join(
                f"<tr><td>{escape(c.metric)}</td><td>{c.first:.3f}</td><td>{c.last:.3f}</td>"
                f"<td>{c.last - c.first:+.3f}</td><td>{between(c.low, c.high, '+.3f')}</td></tr>"
                for c in changes(scores, weights, step)
            )
            head = f"<tr><th>{weights}</th><th>step 0</th><th>step {step:,}</th><th>change</th><th>95 % interval</th></tr>"
            tables += f'<div class="wide"><table>{head}{rows}</table></div>'
    note = "<p>Paired by prompt and noise. The interval (Student's t) is over images, not over training seeds.</p>"
    if any(score.metric.startswith(retrieval.PREFIX) for score in scores):
        note += f"<p>{retrieval.MEANING}</p>"
    return tables + note if tables else "<p>No images were scored: set eval=paper or eval=toybox.</p>"
