"""HTML of runs and comparisons in notebook cells. Text from files is escaped. Imports no torch at import time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image

from . import page
from .runfolder import RunFolder

WIDEST = 1200  # px of a grid
HEIGHT = 720  # px of a page in a cell


def run(folder: RunFolder, cfg: DictConfig, images: dict[int, Path], steps: int) -> str:
    """A run's prompt, best step, and its first and last grid side by side."""
    from . import report

    numbers = report.read_numbers(folder)
    asked = f"<code>{escape(cfg.dataset.instance_prompt)}</code>, {steps:,} of {cfg.trainer.max_steps:,} steps"
    values = {name: series[-1][1] for name, series in numbers.items()}
    last = "".join(f"<tr><td>{escape(name)}</td><td>{value:.5g}</td></tr>" for name, value in values.items())
    return (
        f"<div><b>{escape(folder.root.name)}</b>: {asked}{report.sections.verdict(folder, numbers)}"
        f"{_grids(images, list(cfg.validation.prompts))}"
        f"<details><summary>last metrics</summary><table>{last}</table></details></div>"
    )


def framed(document: str) -> str:
    """A whole page in a cell: in a sandboxed frame, whose scripts can't access the notebook."""
    frame = f'sandbox="allow-scripts" width="100%" height="{HEIGHT}" style="border:0;background:Canvas"'
    return f'<iframe title="comparison" {frame} srcdoc="{escape(document)}"></iframe>'


def _grids(images: dict[int, Path], prompts: Sequence[str]) -> str:
    if not images:
        return "<p>This run has no images.</p>"
    from .callbacks.image_grids import beside

    first, last = min(images), max(images)
    shown = [images[first]] if first == last else [images[first], images[last]]
    grid = beside([Image.open(path) for path in shown], max(len(prompts), 1))
    grid.thumbnail((WIDEST, 10 * WIDEST))
    steps = " and ".join(f"step {step:,}" + (" (the base model)" if step == 0 else "") for step in dict.fromkeys((first, last)))
    rows = "; ".join(prompts)
    caption = f"{steps}; the same column on both sides starts from the same noise; rows: {rows}"
    return (
        f"<figure>{page.picture(grid.convert('RGB'), caption)}<figcaption><small>{escape(caption)}</small></figcaption></figure>"
    )
