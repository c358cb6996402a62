"""The model card beside an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from ..adapter import Adapter, Form
from ..config import LOCAL, enums
from ..models.family import Family
from ..runfolder import RunFolder
from .card_files import programs, table, word_usage
from .header import public
from .scores import changes, read_scores

HEADERS = {  # the metadata of the safetensors files
    enums.Metadata.full: " The headers of the safetensors files contain the whole\nconfiguration.",
    enums.Metadata.public: " The headers of the safetensors files contain the\nconfiguration, without local paths and accounts.",
    enums.Metadata.none: "",
}
CHANGES = {
    "nf4": "65 %",
    "int4": "22 %",
    "int8": "1.4 %",
}  # change of a LoRA's effect on the full base, by the quantisation it was trained with
HERE = "."  # the folder of the card
BASE, TRAINED = "images_base.png", "images.png"


def card(
    cfg: DictConfig, run: RunFolder, folder: Path, place: Path, step: int, adapter: Adapter, family: Family, form: Form,
    files: Mapping[Path, str], word: str | None, why: str,
) -> str:  # fmt: skip
    """README.md in the hub's format: base model, prompt, how to load it, what each file is for, images and metrics. Images are
    copied beside it.

    Args:
        folder: the current folder of the files.
        place: their final folder.
        files: relative to the folder → their purpose.
        word: the token whose embedding was trained, or None.
        why: the reason why this step was exported, if it is not the last.
    """
    averaged = folder.name == "ema"
    model = cfg.model if cfg.export.metadata is enums.Metadata.full else public(cfg).model
    base = model.pretrained
    code = _place(cfg, place, averaged, cfg.export.push_to_hub and not why)
    if base.startswith(LOCAL):
        code += f"# the base model is a local folder: replace {base.removeprefix(LOCAL)!r} by its path on your machine\n"
    code += family.loading(base, model.config) + "\n" + adapter.usage(family.denoiser_part, form, family.kohya)
    code += "\n" + family.token_usage(word) if word else ""
    readers = [program for program in family.programs if program not in adapter.unread]
    shown = _images(cfg, run, folder)
    embedding = next((path for path, kind in files.items() if kind == "embedding"), None)
    return f"""---
{_front_matter(cfg)}
---
# {cfg.dataset.instance_prompt}

{_what(cfg, base, step, averaged)}{f" {why}" if why else ""}{HEADERS[cfg.export.metadata]}

```python
{code}
pipeline({json.dumps(cfg.dataset.instance_prompt, ensure_ascii=False)}).images[0].save("picture.png")
```

## Files

{table(folder, files, family, readers)}
{programs(files, readers, form.name)}{word_usage(word, embedding, family.programs) if word and embedding else ""}{_notes(cfg)}
## Images

{shown}
## Metrics

{_metrics(run)}"""


def _notes(cfg: DictConfig) -> str:
    return _base_note(cfg) + _rank_note(cfg)


def _base_note(cfg: DictConfig) -> str:
    """A note on the quantised base, for use of the update with another base."""
    kind = cfg.quant.kind.value
    if kind == "none":
        return ""
    measured = f" In one measurement it changed by {CHANGES[kind]}." if kind in CHANGES else ""
    return f"""
## The base

The base model was quantised to {kind} during training and for the images shown here. With the base in full precision the update's
effect differs.{measured} Load the base in {kind} to reproduce the images.
"""


def _rank_note(cfg: DictConfig) -> str:
    """What a rank by time means for who uses the file elsewhere."""
    if cfg.adapter.rank_schedule is enums.RankSchedule.none:
        return ""
    return """
## The rank

At noisy timesteps some of the ranks were left out in training (T-LoRA), and in the images of this card. Other programs apply all
ranks at all timesteps, as does the code above, and generate other images. `python -m dreambooth_lab.tools.generate file=FILE`
samples as in training.
"""


def usage(folder: Path) -> str:
    """The code on an export's card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text.partition("```python\n")[2].partition("```")[0]


def _place(cfg: DictConfig, place: Path, averaged: bool, pushed: bool) -> str:
    """Code that sets the location of the export: on the hub, or in the run's folder."""
    if pushed:
        below = ' + "/ema"' if averaged else ""
        return f'from huggingface_hub import snapshot_download\nexport = snapshot_download("{cfg.export.repo}"){below}\n'
    where = place.as_posix() if cfg.export.metadata is enums.Metadata.full else HERE
    return f'export = "{where}"\n'


def _what(cfg: DictConfig, base_model: str, step: int, averaged: bool) -> str:
    base = cfg.quant.kind.value if cfg.quant.kind.value != "none" else cfg.model.dtype.value
    rows = cfg.dataset.batch_size * cfg.trainer.accumulate_grad_batches
    return (
        f"{'Averaged weights (EMA) of ' if averaged else ''}{_algorithm(cfg)} on {base_model.removeprefix(LOCAL)} in {base}: "
        f"{step:,} optimiser steps of {rows} rows, learning rate {cfg.optimizer.lr:g}, prior {cfg.prior.kind.value}, "
        f"seed {cfg.seed}."
    )


def _algorithm(cfg: DictConfig) -> str:
    if cfg.adapter.preset:
        return f"LyCORIS by {Path(cfg.adapter.preset).name}"
    return cfg.adapter.algorithm + (f" of rank {cfg.adapter.rank}" if cfg.adapter.algorithm != "full" else "")


def _front_matter(cfg: DictConfig) -> str:
    """JSON is valid YAML; a local folder is not a model of the hub."""
    is_local = Path(cfg.model.pretrained).expanduser().exists()
    values = {} if is_local else {"base_model": cfg.model.pretrained}
    values |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": cfg.dataset.instance_prompt,
        "tags": ["dreambooth", cfg.adapter.algorithm, "text-to-image", "diffusers"],
    }
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())


def _images(cfg: DictConfig, run: RunFolder, folder: Path) -> str:
    grids = sorted(run.image_folder.glob("step_*.png"))
    if not grids:
        return "There are no validation images.\n"
    shutil.copyfile(grids[0], folder / BASE)
    shutil.copyfile(grids[-1], folder / TRAINED)
    prompts = "\n".join(f"- {prompt}" for prompt in cfg.validation.prompts)
    first, last = (int(grid.stem.removeprefix("step_")) for grid in (grids[0], grids[-1]))
    return f"""Rows from top to bottom:

{prompts}

Step {last:,}:

![step {last:,}]({TRAINED})

Step {first:,}, from the same noise:

![step {first:,}]({BASE})
"""


def _metrics(run: RunFolder) -> str:
    last = {name: (step, value) for step, name, value in run.read_metrics()}
    rows = "\n".join(f"| {name} | {value:.6g} | {step:,} |" for name, (step, value) in sorted(last.items()))
    scored = "\n".join(
        f"| {c.metric} | {c.first:.3f} | {c.last:.3f} | {c.low:+.3f} to {c.high:+.3f} |" for c in changes(read_scores(run))
    )
    table = f"| metric | last value | at step |\n|---|---|---|\n{rows}\n"
    head = "\n| score | base model | trained | change, 95 % |\n|---|---|---|---|\n"
    return table + (head + scored + "\n" if scored else "")
