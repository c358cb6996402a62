"""The summary at the end of a run, in three lines: what changed, which step to keep, how to use it."""

from __future__ import annotations

import shlex
from html import unescape
from pathlib import Path
from statistics import fmean

from safetensors import SafetensorError, safe_open

from ..callbacks.ema import LIVE
from ..callbacks.scores import changes, read_scores
from ..runfolder import RunFolder
from .sections import Metrics, advice

MOST = 4  # metrics that are shown
OTHERS = ("lora_", "diffusion_model.")  # key prefixes in files for ComfyUI, A1111 and similar programs


def lines(folder: RunFolder, numbers: Metrics) -> list[str]:
    """Three lines, from the run's folder.

    Args:
        numbers: name → (step, value), all logged metrics.
    """
    return [f"learned: {learned(folder, numbers)}", f"keep: {unescape(advice(folder, numbers))}", f"use: {use(folder)}"]


def learned(folder: RunFolder, numbers: Metrics) -> str:
    """Metrics compared with the base model: scores of validation images, and the loss on held-out images."""
    changed = [f"{c.metric} {c.first:.3f} → {c.last:.3f}" for c in changes(read_scores(folder), LIVE)][:MOST]
    held = dict(numbers.get("eval/loss", []))
    if 0 in held and len(held) > 1:
        changed.insert(0, f"eval/loss {held[0]:.4g} → {held[max(held)]:.4g}")
    if changed:
        return f"{'; '.join(changed)} (base model → step {_last(numbers):,})"
    losses = [value for _, value in numbers.get("train/loss", [])]
    tenth = max(len(losses) // 10, 1)
    train = (
        f"train/loss {fmean(losses[:tenth]):.4g} → {fmean(losses[-tenth:]):.4g} (first and last tenth)" if losses else "no step"
    )
    return f"{train}; no comparison with the base model: set eval=paper to score images, or eval.path=FOLDER for held-out photos"


def use(folder: RunFolder) -> str:
    """The command that generates images, and the file for ComfyUI."""
    best = folder.best_export if folder.best() else folder.export
    cfg = folder.saved_config()
    prompt = cfg.dataset.instance_prompt or next(iter(cfg.validation.prompts), "…")
    place = f"run={folder.root}" if best == folder.export else f"file={best}"
    draw = f"python -m dreambooth_lab.tools.generate {shlex.quote(place)} {shlex.quote(f'prompt={prompt}')}"
    file = for_comfyui(best)
    return f"{draw}" + (f"; for ComfyUI copy {file} to ComfyUI/models/loras" if file else f"; the files are in {best}")


def for_comfyui(export: Path) -> Path | None:
    """The file of an export with the key names of ComfyUI, A1111 and similar programs; None if there is none."""
    for file in sorted(export.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                if any(key.startswith(OTHERS) for key in opened.keys()):  # noqa: SIM118
                    return file
        except SafetensorError:
            continue
    return None


def _last(numbers: Metrics) -> int:
    return int(max((values[-1][0] for values in numbers.values()), default=0))
