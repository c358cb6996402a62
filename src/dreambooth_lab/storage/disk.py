"""Free disk space, checked before a run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from math import ceil
from pathlib import Path

from omegaconf import DictConfig

from ..config import ConfigError, enums

MB = 1e6
HEADER = 4e4  # bytes of an exported file besides its weights: names, configuration, a thumbnail
PIXEL = 2.0  # bytes of a PNG per pixel, for photographs


def require(folder: Path, needs: Mapping[str, float], way_out: str) -> None:
    """Refuse a run that does not fit on the disk.

    Args:
        folder: the output folder; it need not exist yet.
        needs: purpose → bytes.

    Raises:
        ConfigError: names the needed and the free space, and a fix.
    """
    whole = sum(needs.values())
    if whole > (free := free_bytes(folder)):
        parts = ", ".join(f"{what} {size / MB:,.0f} MB" for what, size in needs.items() if size)
        raise ConfigError(
            f"{folder} is on a disk with {free / MB:,.0f} MB free, and this run will write about {whole / MB:,.0f} MB "
            f"({parts}); {way_out}"
        )


def of_run(cfg: DictConfig, learning: int, exported: float, looks: int) -> dict[str, float]:
    """Maximum size of a run's folder in bytes, while a new checkpoint or export is written beside the older ones.

    Args:
        learning: bytes of the trainable weights, float32.
        exported: bytes of the exported weights.
        looks: number of validations.
    """
    state = learning * (3 + cfg.ema.enabled + len(cfg.ema.lengths))  # the weights, two moments, the averages
    snapshots = len(cfg.ema.lengths) * ceil(cfg.trainer.max_steps / cfg.ema.snapshot_every_n_steps)
    kept = cfg.checkpoint.keep or ceil(cfg.trainer.max_steps / cfg.checkpoint.every_n_steps)
    export = exported * (1 + cfg.ema.enabled)
    both = 1 + bool(cfg.checkpoint.monitor)  # the best step's in addition to the newest
    drawn = len(cfg.validation.prompts) * cfg.validation.num_images * cfg.validation.resolution**2
    weights = 2 if cfg.ema.enabled and cfg.ema.validation is enums.EmaValidation.comparison else 1
    return {
        f"{kept + 1} checkpoints": state * (kept + 1),
        "the best step's checkpoint": 2 * state * bool(cfg.checkpoint.monitor),
        f"{snapshots} snapshots of averages": snapshots * learning / 2,
        "exports": export * (both + 1),
        f"images of {looks} validations": looks * drawn * weights * PIXEL * 2,  # single images and grids
    }


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, or of its nearest existing parent."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free
