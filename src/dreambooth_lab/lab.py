"""For notebooks: load a run, list runs, compare them, compose a configuration.

from dreambooth_lab import lab
run = lab.load("runs/2026-01-01_12-00-00_dreambooth")
run.config.optimizer.lr, run.metrics["train/loss"][-1]
run.pipeline()("a photo of sks dog in the snow").images[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .config import ConfigError, conf_dir
from .data.simpletuner import first_prompt
from .runfolder import RunFolder, new_folder


class Run:
    """A run's folder, read."""

    def __init__(self, root: Path | str):
        self.folder = RunFolder(root)
        self.config: DictConfig = self.folder.saved_config()

    def __repr__(self) -> str:
        return f"Run({str(self.folder.root)!r}, {self.steps} steps)"

    @cached_property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Name → (optimiser step, value), in order."""
        table: dict[str, list[tuple[int, float]]] = {}
        for step, name, value in self.folder.read_metrics():
            table.setdefault(name, []).append((step, value))
        return table

    @property
    def steps(self) -> int:
        """Optimiser steps logged so far."""
        return max((values[-1][0] for values in self.metrics.values()), default=0)

    @property
    def pictures(self) -> dict[int, Path]:
        """Step → its grid of validation pictures."""
        return {int(path.stem.removeprefix("step_")): path for path in sorted(self.folder.pictures.glob("step_*.png"))}

    def pipeline(self, ema: bool = False) -> Any:
        """The base model's diffusers pipeline with the trained adapter loaded.

        Args:
            ema: the averaged weights instead of the last.

        Raises:
            ConfigError: the run has not finished, or kept no average.
        """
        from .run import Trained

        return Trained(self.config, self.export(ema)).pipeline

    def export(self, ema: bool = False) -> Path:
        """The folder of its newest export, live or averaged.

        Raises:
            ConfigError: there is none yet, or the run keeps no average.
        """
        export = self.folder.export / "ema" if ema else self.folder.export
        if not export.is_dir():
            way_out = "it ran without ema.enabled=true" if ema else f"finish it with resume={self.folder.root}"
            raise ConfigError(f"{str(self.folder.root)!r} has no exported {'average' if ema else 'adapter'}; {way_out}")
        return export


def load(root: Path | str) -> Run:
    """A run by its folder."""
    return Run(root)


def runs(folder: Path | str = "runs") -> list[Run]:
    """Every run at or below a folder, by name; members of a sweep included."""
    return [
        Run(path.parent) for path in sorted(Path(folder).rglob("config.yaml")) if RunFolder(path.parent).environment.is_file()
    ]


def compare(chosen: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a run: its folder, the keys in which the runs differ, and the last value of every metric."""
    flat = [_flatten(OmegaConf.to_container(run.config, resolve=True)) for run in chosen]
    keys = sorted({key for values in flat for key in values})
    differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    return [
        {"run": str(run.folder.root)}
        | {key: values.get(key) for key in differing}
        | {name: series[-1][1] for name, series in run.metrics.items()}
        for run, values in zip(chosen, flat, strict=True)
    ]


def compose(*overrides: str) -> DictConfig:
    """The configuration that a command line of these words would run."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    OmegaConf.register_new_resolver("run_folder", new_folder, replace=True)
    OmegaConf.register_new_resolver("dataset_file_prompt", first_prompt, replace=True)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides))


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix.rstrip("."): values}
    return {key: leaf for name, child in values.items() for key, leaf in _flatten(child, f"{prefix}{name}.").items()}
