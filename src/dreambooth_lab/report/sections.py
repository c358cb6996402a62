"""Sections of a run's page: conclusions, curves and tables of its metrics."""

from __future__ import annotations

from html import escape
from statistics import fmean

from ..callbacks.csv_log import CsvLog
from ..callbacks.ema import EMA, LIVE, PREFIX
from ..callbacks.eval_loss import EvalRow
from ..callbacks.scores import changes, interval, read_scores
from ..config import enums
from ..plots import Line, Series, chart, smoothed
from ..runfolder import RunFolder

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
        chart(f"{name} over steps; thick: running mean", _with_mean(values), y=f"{name} (squared error)", from_zero=True)
        for name, values in numbers.items()
        if name.startswith("train/loss")
    ]
    watched = [(kind, numbers.get(PREFIX[kind] + "eval/loss", [])) for kind in (LIVE, EMA)]
    lines = [Line(values, kind, place) for place, (kind, values) in enumerate(watched) if values]
    if lines:
        base = dict(lines[0].points).get(0)
        caption = "eval/loss over steps; dashed: the base model" + ("; vertical: the best step" if best else "")
        made.append(chart(caption, lines, y="eval/loss (squared error)", level=base, mark=best[1] if best else None))
    return f'<div class="few">{"".join(made)}{_by_time(folder)}</div>{_eval_changes(folder)}'


def _with_mean(values: Series) -> list[Line]:
    return [Line(values, "each step", faint=True), Line(smoothed(values), "running mean")]


def _by_time(folder: RunFolder) -> str:
    """The eval loss by t: of the base model, the best step and the last step."""
    rows_read, steps = _eval_rows(folder)
    lines = []
    for place, step in enumerate(steps):
        times: dict[float, list[float]] = {}
        for row_read in rows_read:
            if row_read.step == step:
                times.setdefault(row_read.t, []).append(row_read.loss)
        lines.append(Line([(t, fmean(found)) for t, found in sorted(times.items())], f"step {step:,}", place))
    caption = "eval/loss by timestep, from data (left) to noise (right)"
    return chart(caption, lines, x="timestep t", y="eval/loss (squared error)") if len(lines) > 1 else ""


def _eval_rows(folder: RunFolder) -> tuple[list[EvalRow], list[int]]:
    """The live weights' rows of the base model, the best step and the last step."""
    rows_read: list[EvalRow] = [a for a in CsvLog(folder.eval, EvalRow).read() if a.weights == LIVE]
    steps, best = sorted({a.step for a in rows_read}), folder.best()
    kept = [best[1]] if best and best[1] in steps else []
    return rows_read, list(dict.fromkeys([*steps[:1], *kept, *steps[-1:]]))


def _eval_changes(folder: RunFolder) -> str:
    """Paired with the base model row by row."""
    rows_read, steps = _eval_rows(folder)
    rows = {step: {(a.dataset, a.image, a.t): a.loss for a in rows_read if a.step == step} for step in steps}
    message = ""
    for step in steps[1:]:
        apart = [loss - rows[steps[0]][key] for key, loss in rows[step].items()]
        low, high = interval(apart)
        against = f"<p>eval/loss at step {step:,} compared with the base model: {fmean(apart):+.4g}"
        message += f"{against} (95 % interval {_between(low, high, '+.4g')}).</p>"
    return message


def _between(low: float, high: float, form: str) -> str:
    return f"{low:{form}} to {high:{form}}" if low == low else "too few values"


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
                f"<td>{c.last - c.first:+.3f}</td><td>{_between(c.low, c.high, '+.3f')}</td></tr>"
                for c in changes(scores, weights, step)
            )
            head = f"<tr><th>{weights}</th><th>step 0</th><th>step {step:,}</th><th>change</th><th>95 % interval</th></tr>"
            tables += f'<div class="wide"><table>{head}{rows}</table></div>'
    note = "<p>Paired by prompt and noise. The interval (Student's t) is over images, not over training seeds.</p>"
    return tables + note if tables else "<p>No images were scored: set eval=paper or eval=toybox.</p>"
