"""Image grids, on disk and in loggers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from PIL import Image

Rows = Sequence[Sequence[Image.Image]]


def save(folder: Path, step: int, rows: Rows) -> Image.Image:
    """Save every image and the grid, which is returned."""
    for i, row in enumerate(rows):
        save_row(folder, step, i, row)
    return save_grid(folder, step, rows)


def save_row(folder: Path, step: int, prompt: int, row: Sequence[Image.Image]) -> list[Path]:
    """Save a prompt's images as step_N/PROMPT_IMAGE.png."""
    own = folder / f"step_{step:07d}"
    own.mkdir(parents=True, exist_ok=True)
    paths = [own / f"{prompt:02d}_{image:02d}.png" for image in range(len(row))]
    for path, picture in zip(paths, row, strict=True):
        picture.save(path)
    return paths


def save_grid(folder: Path, step: int, rows: Rows) -> Image.Image:
    """Save all of a step's images as step_N.png, one row per prompt."""
    sheet = grid(rows)
    sheet.save(folder / f"step_{step:07d}.png")
    return sheet


def grid(rows: Rows) -> Image.Image:
    """A grid of images of one size, without gaps."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (j * width, i * height))
    return sheet


def beside(sheets: Sequence[Image.Image], rows: int) -> Image.Image:
    """Grids with the same number of rows from left to right, with a gap of an eighth of a row."""
    gap = sheets[0].height // rows // 8
    whole = Image.new("RGB", (sum(s.width + gap for s in sheets) - gap, sheets[0].height), "white")
    left = 0
    for sheet in sheets:
        whole.paste(sheet.convert("RGB"), (left, 0))
        left += sheet.width + gap
    return whole


def show(loggers: Iterable[Logger], name: str, sheet: Image.Image, step: int) -> None:
    """Log to the loggers that accept images."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(sheet), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [sheet], step)
