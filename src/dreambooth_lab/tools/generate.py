"""Pictures from a run or an exported file, with diffusers' own pipeline:

    python -m dreambooth_lab.tools.generate run=runs/RUN 'prompt="a photo of sks dog in the snow"' seeds=[0,1,2,3]
    python -m dreambooth_lab.tools.generate file=lora.safetensors 'prompt=["a photo of sks dog", "a dog"]' strengths=[0,0.5,1]

Writes each picture and grid.png: a row for each prompt and strength, a column for each seed. A file made here says in its header
what it was trained on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from safetensors import safe_open

from ..config import Config, ConfigError
from ..lab import load
from ..run import trained_pipeline


@dataclass
class Ask:
    """What may be said."""

    run: str | None = None  # a run's folder, or
    file: str | None = None  # an exported safetensors file, or the folder of one
    prompt: Any = None  # one, or a list
    negative: str = ""
    seeds: Any = 4  # a list, or how many from 0 on
    strengths: Any = 1.0  # of the adapter; one, or a list: 0 is the base model
    steps: int = 28
    guidance: float = 5.0
    resolution: int | None = None  # px; null: the run's validation.resolution
    ema: bool = False  # the averaged weights
    out: str = "generated"


def read(words: list[str]) -> Ask:
    """The command line, typed.

    Raises:
        ConfigError: a word that is not known, or no prompt, or neither a run nor a file.
    """
    try:
        ask: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Ask), OmegaConf.from_cli(words)))
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in fields(Ask))
        raise ConfigError(f"{str(error).splitlines()[0]}; known: {known}") from error
    if (ask.run is None) == (ask.file is None) or not ask.prompt:
        raise ConfigError("say run=FOLDER or file=EXPORT, and prompt=…")
    ask.prompt = [ask.prompt] if isinstance(ask.prompt, str) else list(ask.prompt)
    ask.seeds = list(range(ask.seeds)) if isinstance(ask.seeds, int) else list(ask.seeds)
    ask.strengths = list(ask.strengths) if isinstance(ask.strengths, list) else [float(ask.strengths)]
    return ask


def trained_with(file: Path) -> DictConfig:
    """The configuration in an export's header."""
    found = [file] if file.is_file() else sorted(file.rglob("*.safetensors"))
    for path in found:
        with safe_open(path, "pt") as opened:
            said = (opened.metadata() or {}).get("config")
        if said:
            merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(said))
            assert isinstance(merged, DictConfig)
            return merged
    raise ConfigError(f"file is {str(file)!r}, in which no safetensors file says how it was made; give run=FOLDER")


def paint(ask: Ask) -> Path:
    """Draw everything that was asked for; returns the grid's path."""
    export = load(ask.run).folder.export if ask.run else Path(str(ask.file)).expanduser()
    export = export / "ema" if ask.ema else export
    if not export.exists():
        raise ConfigError(f"{str(export)!r} does not exist; finish the run, or give another file")
    cfg = load(ask.run).config if ask.run else trained_with(export)
    pipeline, adapter = trained_pipeline(cfg, export)
    pipeline.set_progress_bar_config(disable=True)
    edge = ask.resolution or cfg.validation.resolution
    options = {"height": edge, "width": edge, "num_inference_steps": ask.steps, "guidance_scale": ask.guidance}
    rows = []
    for prompt in ask.prompt:
        for strength in ask.strengths:
            adapter.strengthen(pipeline, strength)
            seeds = [torch.Generator().manual_seed(seed) for seed in ask.seeds]
            rows.append([pipeline(prompt, negative_prompt=ask.negative or None, generator=g, **options).images[0] for g in seeds])
    return _save(Path(ask.out), rows)


def _save(folder: Path, rows: list[list[Image.Image]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            picture.save(folder / f"{i:02d}_{j:02d}.png")
            grid.paste(picture, (j * width, i * height))
    grid.save(folder / "grid.png")
    return folder / "grid.png"


def main() -> None:
    try:
        print(paint(read(sys.argv[1:])))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
