"""The model card beside an export."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from ..runfolder import RunFolder


def card(cfg: DictConfig, run: RunFolder, folder: Path, step: int, why: str) -> str:
    """README.md in the hub's form: base model, prompt, numbers, and the newest pictures, which are copied beside it."""
    values = {name: value for _, name, value in run.read_metrics()}
    numbers = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(values.items()))
    grids = sorted(run.pictures.glob("step_*.png"))
    if grids:
        shutil.copyfile(grids[-1], folder / "pictures.png")
    prompts = "\n".join(f"- {prompt}" for prompt in cfg.validation.prompts)
    pictures = f"![a row a prompt](pictures.png)\n\nRows from above:\n\n{prompts}\n" if grids else "None were made.\n"
    files = "\n".join(f"- `{path.relative_to(folder).as_posix()}`" for path in sorted(folder.rglob("*.safetensors")))
    return f"""---
base_model: {cfg.model.pretrained}
instance_prompt: {cfg.dataset.instance_prompt!r}
library_name: diffusers
tags: [dreambooth, {cfg.adapter.algorithm}, text-to-image]
---
# {cfg.dataset.instance_prompt}

{cfg.adapter.algorithm} of rank {cfg.adapter.rank}, {step:,} optimiser steps at {cfg.optimizer.lr:g}, seed {cfg.seed};
base in {cfg.quant.kind.value if cfg.quant.kind.value != "none" else cfg.model.dtype.value}.{f" {why}" if why else ""}

## Pictures

{pictures}
## Files

{files}

## Last values

| what | value |
|---|---|
{numbers}
"""
