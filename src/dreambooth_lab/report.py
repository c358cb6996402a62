"""One self-contained HTML page a run: what was asked, the curves, the pictures over time, and how to go on."""

from __future__ import annotations

import base64
import io
from html import escape
from itertools import pairwise
from string import Template

from omegaconf import OmegaConf
from PIL import Image

from .callbacks.card import usage
from .callbacks.scores import changes, read_scores
from .runfolder import RunFolder

Series = list[tuple[int, float]]

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>$title</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:0 auto;padding:1rem;color:#1c1c1c;background:#fff}
h1{font-size:1.4rem} h2{font-size:1.1rem;margin-top:2rem;border-bottom:1px solid #ddd} img{max-width:100%;display:block}
table{border-collapse:collapse} td,th{padding:.2rem .8rem .2rem 0;text-align:left} td+td{font-variant-numeric:tabular-nums}
pre{background:#f5f5f5;padding:.8rem;overflow-x:auto;font-size:.8rem} figure{margin:1rem 0} figcaption{color:#666}
svg{width:100%;height:auto;background:#fafafa} .thin{stroke:#9db8d6;fill:none} .thick{stroke:#1d4f8c;stroke-width:2;fill:none}
</style></head><body>
<h1>$title</h1>
<p>$prompt: $steps optimiser steps.</p>
<h2>Pictures</h2>$pictures
<h2>Loss</h2>$curves
<h2>What changed</h2>$changes
<h2>Last values</h2><table>$values</table>
<h2>What it took</h2>$cost
<h2>Before training</h2><pre>$preflight</pre>
<h2>Use it</h2><pre>$usage</pre>
<h2>Configuration</h2><details><summary>config.yaml</summary><pre>$config</pre></details>
</body></html>
""")

USAGE = Template("""$usage
# go on for longer:
python -m dreambooth_lab resume=$root trainer.max_steps=$more""")


def write(folder: RunFolder) -> None:
    """Write the page from what the folder holds now."""
    cfg = folder.saved_config()
    series: dict[str, Series] = {}
    for step, name, value in folder.read_metrics():
        series.setdefault(name, []).append((step, value))
    steps = max((values[-1][0] for values in series.values()), default=0)
    code = usage(folder.export) if folder.export.is_dir() else ""
    how = USAGE.substitute(usage=code, root=folder.root, more=2 * steps)
    page = PAGE.substitute(
        title=escape(folder.root.resolve().name),
        prompt=escape(cfg.dataset.instance_prompt),
        steps=f"{steps:,}",
        pictures=_pictures(folder, list(cfg.validation.prompts)),
        curves="".join(_curve(name, values) for name, values in series.items() if "loss" in name),
        changes=_changes(folder),
        values="".join(f"<tr><td>{escape(name)}</td><td>{v[-1][1]:.6g}</td></tr>" for name, v in series.items()),
        cost=_cost(folder),
        preflight=escape(folder.preflight.read_text(encoding="utf-8")),
        usage=escape(how),
        config=escape(OmegaConf.to_yaml(cfg)),
    )
    folder.report.write_text(page, encoding="utf-8")


def _pictures(folder: RunFolder, prompts: list[str]) -> str:
    """Per prompt the base model's pictures over the last ones, same noise in each column; every step's grid below."""
    grids = sorted(folder.pictures.glob("step_*.png"))
    if not grids:
        return "<p>None were asked for.</p>"
    before_after(folder, len(prompts)).save(folder.before_after)
    rows = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
    pair = f"left: {_step(grids[0].stem)}; right: {_step(grids[-1].stem)}; a column on either side starts from the same noise"
    figures = "".join(f"<figure>{_image(path)}<figcaption>{_step(path.stem)}</figcaption></figure>" for path in grids)
    return (
        f"<p>Rows from above:</p><ol>{rows}</ol><figure>{_image(folder.before_after)}<figcaption>{pair}</figcaption></figure>"
        f"<details><summary>every step</summary>{figures}</details>"
    )


def before_after(folder: RunFolder, prompts: int) -> Image.Image:
    """The first grid and the last, side by side, a gap between them."""
    grids = sorted(folder.pictures.glob("step_*.png"))
    first, last = (Image.open(grids[i]).convert("RGB") for i in (0, -1))
    gap = first.height // prompts // 8
    sheet = Image.new("RGB", (2 * first.width + gap, first.height), "white")
    sheet.paste(first, (0, 0))
    sheet.paste(last, (first.width + gap, 0))
    return sheet


def _changes(folder: RunFolder) -> str:
    """Each metric before and after, with the 95 % interval of the paired change."""
    rows = "".join(
        f"<tr><td>{escape(c.metric)}</td><td>{c.first:.3f}</td><td>{c.last:.3f}</td>"
        f"<td>{c.last - c.first:+.3f}</td><td>{c.low:+.3f} to {c.high:+.3f}</td></tr>"
        for c in changes(read_scores(folder))
    )
    head = "<tr><th>metric</th><th>step 0</th><th>last</th><th>change</th><th>95 % interval</th></tr>"
    note = "Paired by prompt and noise; the interval covers pictures, not training seeds."
    return f"<table>{head}{rows}</table><p>{note}</p>" if rows else "<p>Nothing was scored: choose eval=paper or eval=toybox.</p>"


def _cost(folder: RunFolder) -> str:
    """Phases of every start that came to its end."""
    rows = "".join(
        f"<tr><td>{escape(start['started'])}</td><td>{escape(phase)}</td><td>{took['seconds']:.1f}</td>"
        f"<td>{took['memory_mib']:,.0f}</td><td>{took['device_memory_mib'] or '-'}</td></tr>"
        for start in folder.starts()
        for phase, took in start.get("cost", {}).items()
    )
    head = "<tr><th>started</th><th>phase</th><th>seconds</th><th>process, peak MiB</th><th>device, peak MiB</th></tr>"
    return f"<table>{head}{rows}</table>" if rows else "<p>It has not come to its end yet.</p>"


def _step(stem: str) -> str:
    step = int(stem.removeprefix("step_"))
    return f"step {step:,}" if step else "step 0: the base model"


def _image(path: object, widest: int = 1600) -> str:
    """A grid as an inlined JPEG; the full pictures stay beside the page."""
    picture = Image.open(str(path)).convert("RGB")
    picture.thumbnail((widest, 10 * widest))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _curve(name: str, values: Series) -> str:
    """Every value, thin, and its running mean over 5 % of the run, thick."""
    top = max(v for _, v in values) or 1.0
    last = max(values[-1][0], 1)
    smooth, mean, share = [], values[0][1], min(1.0, 20 / len(values))
    for step, value in values:
        mean += share * (value - mean)
        smooth.append((step, mean))
    lines = "".join(
        f'<path class="{style}" d="{_path(line, last, top)}"/>' for style, line in (("thin", values), ("thick", smooth))
    )
    caption = f"{escape(name)}, 0 to {top:.3g}, over steps {values[0][0]:,} to {last:,}; thick: running mean"
    return f'<figure><svg viewBox="0 0 1000 220">{lines}</svg><figcaption>{caption}</figcaption></figure>'


def _path(values: Series, last: int, top: float) -> str:
    points = [(1000 * step / last, 210 - 200 * value / top) for step, value in values]
    if len(points) == 1:
        points.append((points[0][0] + 1, points[0][1]))
    move = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    return move + "".join(f"L{x:.1f} {y:.1f}" for _, (x, y) in pairwise(points))
