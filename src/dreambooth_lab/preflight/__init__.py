"""The preflight: tables of data, prompts, settings and output files, shown before training and saved with the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omegaconf import DictConfig
from rich.table import Table

from .. import terminal
from ..data.module import DreamBoothData
from ..dreambooth import DreamBooth
from ..runfolder import RunFolder
from . import crops, overview, tables


def show(
    cfg: DictConfig,
    data: DreamBoothData,
    module: DreamBooth,
    layers: list[str],
    folder: RunFolder,
    needed: Mapping[str, float],
    shown: Sequence[Table] = (),
) -> None:
    """Print the preflight; write it, with earlier tables, and a sheet of the crops into the folder.

    Args:
        needed: expected size of the folder in bytes, by purpose.
    """
    crops.save(data, folder.crops)
    made = [
        tables.datasets(data), tables.mixture(data), tables.crops(data), tables.much_cut(data), tables.rejected(data.summaries()),
        tables.notices(data), tables.buckets(data), overview.prompts(cfg), overview.captions(data),
        tables.training(cfg, data, module, layers), overview.files(cfg, folder, needed), tables.device_memory(cfg, data, module),
    ]  # fmt: skip
    terminal.show(*made)
    with folder.preflight.open("w", encoding="utf-8") as file:
        terminal.show(*shown, *made, on=terminal.console(file))
