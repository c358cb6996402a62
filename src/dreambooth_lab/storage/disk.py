"""Room on disks, asked for before the work that fills them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from math import ceil
from pathlib import Path

from omegaconf import DictConfig

from ..config import ConfigError, enums

MB = 1e6
HEADER = 4e4  # bytes of an exported file besides its numbers: names, configuration, a small picture
PIXEL = 2.0  # bytes of a PNG for each pixel, as photographs have them


def require(folder: Path, needs: Mapping[str, float], way_out: str) -> None:
    """Refuse to begin what a disk can't hold.

    Args:
        folder: where it will be written; it need not be there yet.
        needs: what for → bytes.

    Raises:
        ConfigError: says what it needs, what is free, and the way out.
    """
    whole = sum(needs.values())
    if whole > (free := free_bytes(folder)):
        parts = ", ".join(f"{what} {size / MB:,.0f} MB" for what, size in needs.items() if size)
        raise ConfigError(
            f"{folder} lies on a disk with {free / MB:,.0f} MB free, and this run will write about {whole / MB:,.0f} MB there "
            f"({parts}); {way_out}"
        )


def of_run(cfg: DictConfig, learning: int, exported: float, looks: int) -> dict[str, float]:
    """Bytes that a run's folder will hold at most, while a new checkpoint or export lies beside the older ones.

    Args:
        learning: bytes of what learns, float32.
        exported: bytes of the files of an export that hold all of it.
        looks: how often pictures are drawn.
    """
    state = learning * (3 + cfg.ema.enabled)  # the weights, two moments, the average
    kept = cfg.checkpoint.keep or ceil(cfg.trainer.max_steps / cfg.checkpoint.every_n_steps)
    export = exported * (1 + cfg.ema.enabled)
    both = 1 + bool(cfg.checkpoint.monitor)  # the best step's beside the newest
    drawn = len(cfg.validation.prompts) * cfg.validation.num_images * cfg.validation.resolution**2
    weights = 2 if cfg.ema.enabled and cfg.ema.validation is enums.EmaValidation.comparison else 1
    return {
        f"{kept + 1} checkpoints": state * (kept + 1),
        "the best step's checkpoint": 2 * state * bool(cfg.checkpoint.monitor),
        "exports": export * (both + 1),
        f"pictures of {looks} looks": looks * drawn * weights * PIXEL * 2,  # by themselves and in grids
    }


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, or of the nearest one above it that is there."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
