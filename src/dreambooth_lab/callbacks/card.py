"""The model card beside an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from omegaconf import DictConfig

from ..adapter import Adapter
from ..models.family import Family
from ..runfolder import RunFolder
from .scores import changes, read_scores

BASE, TRAINED = "pictures_base.png", "pictures.png"


def card(
    cfg: DictConfig, run: RunFolder, folder: Path, place: Path, step: int, adapter: Adapter, family: Family, word: str | None,
    why: str,
) -> str:  # fmt: skip
    """README.md in the hub's form: base model, prompt, how to load it, pictures and numbers. Pictures are copied beside it.

    Args:
        folder: where the files are now.
        place: where they will be.
        word: the token whose embedding was learned, or None.
        why: this step's weights are kept, if they are not the last.
    """
    averaged = folder.name == "ema"
    code = _place(cfg, place, averaged, cfg.export.push_to_hub and not why)
    code += adapter.usage.format(base=cfg.model.pretrained, part=family.denoiser_part)
    code += "\n" + family.token_usage(word) if word else ""
    files = "\n".join(f"- `{path.relative_to(folder).as_posix()}`" for path in sorted(folder.rglob("*.safetensors")))
    return f"""---
{_front_matter(cfg)}
---
# {cfg.dataset.instance_prompt}

{_what(cfg, step, averaged)}{f" {why}" if why else ""} The headers of the safetensors files hold the whole
configuration.

```python
{code}
pipeline({json.dumps(cfg.dataset.instance_prompt, ensure_ascii=False)}).images[0].save("picture.png")
```

## Pictures

{_pictures(cfg, run, folder)}
## Numbers

{_numbers(run)}
## Files

{files}
"""


def usage(folder: Path) -> str:
    """The code on an export's card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text.partition("```python\n")[2].partition("```")[0]


def _place(cfg: DictConfig, place: Path, averaged: bool, pushed: bool) -> str:
    """Code that says where the export is: on the hub, or where the run leaves it."""
    if pushed:
        below = ' + "/ema"' if averaged else ""
        return f'from huggingface_hub import snapshot_download\nexport = snapshot_download("{cfg.export.repo}"){below}\n'
    return f'export = "{place.as_posix()}"\n'


def _what(cfg: DictConfig, step: int, averaged: bool) -> str:
    base = cfg.quant.kind.value if cfg.quant.kind.value != "none" else cfg.model.dtype.value
    rows = cfg.dataset.batch_size * cfg.trainer.accumulate_grad_batches
    return (
        f"{'Averaged weights (EMA) of ' if averaged else ''}{_algorithm(cfg)} on {cfg.model.pretrained} in {base}: {step:,} "
        f"optimiser steps of {rows} rows at rate {cfg.optimizer.lr:g}, prior {cfg.prior.kind.value}, seed {cfg.seed}."
    )


def _algorithm(cfg: DictConfig) -> str:
    if cfg.adapter.preset:
        return f"LyCORIS by {Path(cfg.adapter.preset).name}"
    return cfg.adapter.algorithm + (f" of rank {cfg.adapter.rank}" if cfg.adapter.algorithm != "full" else "")


def _front_matter(cfg: DictConfig) -> str:
    """JSON is YAML; a folder of this machine is no model of the hub's."""
    is_local = Path(cfg.model.pretrained).expanduser().exists()
    said = {} if is_local else {"base_model": cfg.model.pretrained}
    said |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": cfg.dataset.instance_prompt,
        "tags": ["dreambooth", cfg.adapter.algorithm, "text-to-image", "diffusers"],
    }
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in said.items())


def _pictures(cfg: DictConfig, run: RunFolder, folder: Path) -> str:
    grids = sorted(run.pictures.glob("step_*.png"))
    if not grids:
        return "None were made.\n"
    shutil.copyfile(grids[0], folder / BASE)
    shutil.copyfile(grids[-1], folder / TRAINED)
    prompts = "\n".join(f"- {prompt}" for prompt in cfg.validation.prompts)
    first, last = (int(grid.stem.removeprefix("step_")) for grid in (grids[0], grids[-1]))
    return f"""Rows from above:

{prompts}

Step {last:,}:

![step {last:,}]({TRAINED})

Step {first:,}, from the same noise:

![step {first:,}]({BASE})
"""


def _numbers(run: RunFolder) -> str:
    last = {name: (step, value) for step, name, value in run.read_metrics()}
    rows = "\n".join(f"| {name} | {value:.6g} | {step:,} |" for name, (step, value) in sorted(last.items()))
    scored = "\n".join(
        f"| {c.metric} | {c.first:.3f} | {c.last:.3f} | {c.low:+.3f} to {c.high:+.3f} |" for c in changes(read_scores(run))
    )
    table = f"| what | last value | at step |\n|---|---|---|\n{rows}\n"
    head = "\n| score | base model | trained | change, 95 % |\n|---|---|---|---|\n"
    return table + (head + scored + "\n" if scored else "")
