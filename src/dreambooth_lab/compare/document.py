"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isnan
from statistics import fmean

from ..page import document as whole
from ..page import picture
from ..plots import THEME, script
from . import figures, shared, tradeoff
from .arms import Arm, Study
from .conclusions import Part, lead, parts
from .runs import TRAIN_LOSS
from .stats import Difference, Estimate, at_end, estimate, results

STYLE = """h2{font-size:1.15em;margin-top:2em}figure{margin:.6em 0}
.wide{overflow-x:auto}table{border-collapse:collapse;overflow-wrap:normal}
td,th{padding:.25em 1em .25em 0;text-align:left;vertical-align:top;border-bottom:1px solid #8883}
td{font-variant-numeric:tabular-nums}
.few{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,30em),1fr));gap:.5em 1.5em}.few>*{min-width:0}
.strips{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21em),1fr));gap:.2em 1em}.strips>*{min-width:0}
.sure{font-weight:600}h3{font-size:1em;margin:1.2em 0 .2em}"""


MOST_STRIPS = 400  # of images on a page, about 60 kB each
DRAWS = ("dataset.", "prior.", "trainer.accumulate_grad_batches", "objective.")  # keys that can change which samples are drawn


def document(title: str, study: Study, found: Sequence[Difference]) -> str:
    """The whole page as HTML."""
    chosen = results(study)
    values = {metric: [one for one in found if one.metric == metric] for metric in chosen}
    body = (
        _summary(study)
        + f"<h2>What can be concluded</h2>{_conclusions(study, values)}"
        + f"<h2>What differs</h2>{_differing(study)}"
        + _tradeoff(study)
        + f"<h2>Differences</h2>{_effects(values)}"
        + f"<h2>Final metrics</h2>{_means(study, chosen)}"
        + f"<h2>Curves</h2>{_curves(study, chosen)}"
        + f"<h2>Images</h2>{_images(study)}"
        + f"<h2>Cost</h2>{_cost(study)}"
        + f"<h2>Runs</h2>{_runs(study)}"
        + THEME
    )
    return whole(title, body, STYLE, script())


def _summary(study: Study) -> str:
    runs, seeds = sum(len(arm.runs) for arm in study.arms), ", ".join(map(str, study.seeds))
    text = f"{runs} runs in {len(study.arms)} arms; seeds {seeds}. The reference is <b>{escape(study.arms[0].name)}</b>."
    text += _averaged(study) if study.averaged else ""
    bad = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in study.absent)
    return f"<p>{text}</p>" + (f'<p class="bad">Not compared:</p><ul>{bad}</ul>' if bad else "")


def _averaged(study: Study) -> str:
    """What a seed's figures are means of."""
    values = dict.fromkeys(", ".join(draw.averaged) for draw in study.draws)
    keys, also = ", ".join(study.averaged), ", ".join(study.following)
    text = f" Each seed's metrics are means over {keys}: {'; '.join(values)}; conclusions hold for these on average."
    return escape(text + (f" Also different between these: {also}." if also else ""))


def _conclusions(study: Study, values: dict[str, list[Difference]]) -> str:
    if len(study.arms) < 2:
        return "<p>There is only one arm, so nothing is compared; means and intervals are below.</p>"
    items = "".join(f"<li>{escape(lead(metric, found))}{_parts(found)}</li>" for metric, found in values.items())
    tests = sum(one.p == one.p for found in values.values() for one in found)
    each = len(study.arms) - 1
    many = f"the {each} comparisons" if each > 1 else "the one comparison"
    note = (
        f"Two-sided t-tests at 5 %, with Holm's correction over {many} of each metric. If the arms do not differ, each of the "
        f"{len(values)} metrics still has a 5 % chance of a false positive. If a finding is not significant with all "
        f"{tests} comparisons corrected together, its sentence says so. Intervals from few seeds assume a normal distribution."
    )
    return f"<ul>{items}</ul><p><small>{note} {_pairing(study)}</small></p>"


def _parts(found: Sequence[Difference]) -> str:
    shown = parts(found) or [Part("no other arm has this metric", False)]
    items = "".join(f"<li{' class=sure' * part.sure}>{escape(part.text)}</li>" for part in shown)
    return f"<ul>{items}</ul>"


def _pairing(study: Study) -> str:
    """A note on what runs of one seed have in common."""
    draws = [key for key in study.differing if key.startswith(DRAWS) and "prompt" not in key]
    text = (
        "Runs of one seed are paired: sample n has the same photo, crop, timestep and noise in both"
        if not draws
        else f"Runs are paired by their seed; {', '.join(map(escape, draws))} differ, so their samples may differ too"
    )
    unlike = shared.unlike(study)
    pictures = (
        f"; images also differ by {', '.join(map(escape, unlike))}"
        if unlike
        else "; image i of a prompt starts from the same noise in all runs"
    )
    worded = "validation.prompts" in study.differing
    prompts = " The prompts differ, so image scores differ before training too: see step 0 of the curves." if worded else ""
    return f"{text}{pictures}.{prompts}"


def _differing(study: Study) -> str:
    if not study.differing:
        return "<p>Only the seed.</p>"
    head = "<tr><th>key</th>" + "".join(f"<th>{escape(arm.name)}</th>" for arm in study.arms) + "</tr>"
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td>"
        + "".join(f"<td>{escape(str(arm.first().values.get(key)))}</td>" for arm in study.arms)
        + "</tr>"
        for key in study.differing
    )
    return _table(head, rows)


def _tradeoff(study: Study) -> str:
    made = tradeoff.figures(study)
    return f'<h2>Likeness and drift</h2><div class="few">{made}</div>' if made else ""


def _effects(values: dict[str, list[Difference]]) -> str:
    made = "".join(figures.effects(metric, found) for metric, found in values.items() if found)
    return f'<div class="few">{made}</div>' if made else "<p>None.</p>"


def _means(study: Study, chosen: Sequence[str]) -> str:
    """Each arm's mean and interval for each metric."""
    note = f"Mean over seeds with its 95 % interval (Student's t). {TRAIN_LOSS}… is the mean over a run's last tenth of steps."
    parts = [name for name in study.metrics if name not in chosen]
    more = f"<details><summary>other metrics</summary>{_estimates(study, parts)}</details>" if parts else ""
    return f"<p><small>{note}</small></p>{_estimates(study, chosen)}{more}"


def _estimates(study: Study, metrics: Sequence[str]) -> str:
    head = "<tr><th></th>" + "".join(f"<th>{escape(arm.name)}</th>" for arm in study.arms) + "</tr>"
    rows = "".join(
        f"<tr><th>{escape(metric)}</th>"
        + "".join(f"<td>{_estimate(estimate(list(at_end(arm, metric).values())))}</td>" for arm in study.arms)
        + "</tr>"
        for metric in metrics
    )
    return _table(head, rows)


def _estimate(estimated: Estimate) -> str:
    if not estimated.n:
        return "–"
    if isnan(estimated.low):
        return f"{estimated.mean:.4g}<br><small>one run</small>"
    return f"{estimated.mean:.4g}<br><small>{estimated.low:.4g} to {estimated.high:.4g}</small>"


def _curves(study: Study, chosen: Sequence[str]) -> str:
    made = "".join(figures.curves(study, metric) for metric in chosen)
    return f'<div class="few">{made}</div>' if made else "<p>No metric was logged more than once.</p>"


def _images(study: Study) -> str:
    """Images of the same prompt and noise side by side; the first seed is expanded, the others are folded."""
    note = "Each strip has the images of one prompt. The n-th image of every strip starts from the same noise."
    parts = []
    left = MOST_STRIPS
    for place, draw in enumerate(study.draws):
        rows = shared.strips(study, draw) if left > 0 else []
        left -= sum(map(len, rows))
        made = "".join(f"<h3>{number}: {escape(row[0].prompt)}</h3>{_strips(row)}" for number, row in enumerate(rows, 1))
        if made:
            parts.append(made if place == 0 else f"<details><summary>{escape(str(draw))}</summary>{made}</details>")
    note += f" {str(study.draws[0]).capitalize()} comes first."
    note += "" if left > 0 else " The page has room for no more; further images are in the runs' folders."
    return f"<p><small>{escape(note)}</small></p>{''.join(parts)}" if parts else "<p>None.</p>"


def _strips(row: Sequence[shared.Strip]) -> str:
    made = ""
    for strip in row:
        message = f"{strip.arm}, step {strip.step:,}" + (f": {strip.prompt}" if strip.prompt != row[0].prompt else "")
        alt = f"images of “{strip.prompt}” by {strip.arm} at step {strip.step}"
        made += f"<figure>{picture(strip.picture, alt)}<figcaption>{escape(message)}</figcaption></figure>"
    return f'<div class="strips">{made}</div>'


def _cost(study: Study) -> str:
    titles = ("", "seconds per run, mean", "TFLOPs per run, mean", "process, peak MiB", "device, peak MiB")
    head = f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"
    rows = "".join(f"<tr><th>{escape(arm.name)}</th>{_cost_cells(arm)}</tr>" for arm in study.arms)
    note = "Wall time of all phases. Jobs in one process share its peak: the largest resident size so far. "
    note += "FLOPs are those of all training steps on one device, from 8 counted ones; in sweeps only. "
    note += "≥: a run was killed and resumed; its time before is unknown."
    return f"{_table(head, rows)}<p><small>{note}</small></p>"


def _cost_cells(arm: Arm) -> str:
    costs = [run.cost() for run in arm.runs.values()]
    device = max(cost["device_peak_mib"] for cost in costs)
    least = "≥ " if any(cost["killed_starts"] for cost in costs) else ""
    seconds, process = fmean(cost["seconds"] for cost in costs), max(cost["process_peak_mib"] for cost in costs)
    flops = fmean(cost["flops"] for cost in costs) / 1e12
    counted = f"{flops:,.4g}" if flops == flops else "–"
    cells = (f"{least}{seconds:,.1f}", counted, f"{process:,.0f}", f"{device:,.0f}" if device else "–")
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _runs(study: Study) -> str:
    head = "<tr><th>arm</th><th>run</th><th>steps</th><th>folder</th></tr>"
    rows = "".join(
        f"<tr><td>{escape(arm.name)}</td><td>{escape(str(draw))}</td>"
        f"<td>{max(series[-1][0] for series in run.series.values()):,}</td><td>{escape(str(run.folder.root))}</td></tr>"
        for arm in study.arms
        for draw, run in arm.runs.items()
    )
    prefix = "repeats an arm's configuration and seed; a newer run is used"
    twice = "".join(f"<p>{escape(name)} {prefix}.</p>" for name in study.repeated)
    return f"<details><summary>all</summary>{_table(head, rows)}{twice}</details>"


def _table(head: str, rows: str) -> str:
    return f'<div class="wide"><table>{head}{rows}</table></div>'
