"""For notebooks: load a run, list runs, compare them, compose and train.

from dreambooth_lab import lab
run = lab.load("runs/2026-01-01_12-00-00_dreambooth")     # as a cell's last line: its images and the best step
run.config.optimizer.lr, run.metrics["train/loss"].plot(backend="plotly")
run.pipeline()("a photo of sks dog in the snow").images[0]
run.module("best", ema=True)                               # the LightningModule with the weights of a checkpoint
lab.runs("runs")                                           # a table, one row per run
lab.compare("runs/SWEEP")                                  # the page of `tools.compare` in the cell

Loading reads tensors and text. Nothing in a run's files is unpickled or called; a class named by its configuration is
instantiated only if it belongs to this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from yaml import YAMLError

from . import resolvers
from .config import ConfigError, check, conf_dir, resolve_paths
from .config.hydra_errors import explain
from .config.typed import as_hydra_reads
from .runfolder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from .compare.arms import Study
    from .compare.stats import Difference
    from .data.module import DreamBoothData
    from .dreambooth import DreamBooth
    from .rebuilt import Which


class Run:
    """A run, read from its folder."""

    def __init__(self, root: Path | str):
        self.folder = RunFolder(root)
        self.config: DictConfig = self.folder.saved_config()

    def __repr__(self) -> str:
        return f"Run({str(self.folder.root)!r}, {self.steps} steps)"

    def _repr_html_(self) -> str:
        from . import notebook

        return notebook.run(self.folder, self.config, self.images, self.steps)

    @cached_property
    def series(self) -> dict[str, list[tuple[int, float]]]:
        """Name → (optimiser step, value), in order: all logged metrics."""
        table: dict[str, list[tuple[int, float]]] = {}
        for step, name, value in self.folder.read_metrics():
            table.setdefault(name, []).append((step, value))
        return table

    @property
    def metrics(self) -> pd.DataFrame:
        """The same as a table: one row per optimiser step, one column per metric; NaN where one was not logged."""
        import pandas as pd

        columns = {name: pd.Series(dict(values), dtype=float) for name, values in self.series.items()}
        return pd.DataFrame(columns).sort_index().rename_axis(index="step")

    @property
    def steps(self) -> int:
        """Optimiser steps logged so far."""
        return max((values[-1][0] for values in self.series.values()), default=0)

    @property
    def images(self) -> dict[int, Path]:
        """Step → its grid of validation images."""
        return {int(path.stem.removeprefix("step_")): path for path in sorted(self.folder.image_folder.glob("step_*.png"))}

    def module(self, checkpoint: Which = "last", ema: bool = False) -> DreamBooth:
        """The LightningModule with the weights of a checkpoint, in evaluation mode, on this machine's device.

        Args:
            checkpoint: last, best (by `checkpoint.monitor`), a step whose checkpoint exists, or a checkpoint's file.
            ema: the averaged weights instead of the trained ones.

        Raises:
            ConfigError: there is no such checkpoint, or it holds no average.
        """
        from . import rebuilt

        return rebuilt.module(self.config, rebuilt.checkpoint_of(self.folder, checkpoint), ema)

    def pipeline(self, checkpoint: Which | None = None, ema: bool = False) -> Any:
        """The base model's diffusers pipeline with the trained adapter loaded.

        Args:
            checkpoint: None for the newest export, or as for `module`.
            ema: the averaged weights instead of the trained ones.

        Raises:
            ConfigError: there is no such export or checkpoint, or it holds no average.
        """
        from . import rebuilt
        from .trained import TrainedPipeline

        if checkpoint is None:
            return TrainedPipeline(rebuilt.here(self.config), self.export(ema)).pipeline
        return rebuilt.pipeline(self.config, rebuilt.checkpoint_of(self.folder, checkpoint), ema)

    def export(self, ema: bool = False) -> Path:
        """The folder of its newest export, live or averaged.

        Raises:
            ConfigError: there is none yet, or the run has no average.
        """
        if not self.folder.export.is_dir():
            self.folder.finish_writes_if_unused()
        export = self.folder.export / "ema" if ema else self.folder.export
        if not export.is_dir():
            way_out = "it ran without ema.enabled=true" if ema else f"finish it with resume={self.folder.root}"
            raise ConfigError(f"{str(self.folder.root)!r} has no exported {'average' if ema else 'adapter'}; {way_out}")
        return export


class Comparison:
    """A comparison of runs, with the same page as `tools.compare`, which a notebook's cell shows."""

    def __init__(self, name: str, study: Study, found: Sequence[Difference]):
        self.name, self.study, self.found = name, study, found

    def __repr__(self) -> str:
        return f"Comparison({self.name!r}, arms: {', '.join(arm.name for arm in self.study.arms)})"

    def _repr_html_(self) -> str:
        from . import notebook
        from .compare.document import document

        return notebook.framed(document(self.name, self.study, self.found))

    @property
    def runs(self) -> pd.DataFrame:
        """One row per run: arm, seed, differing keys, final metrics, cost."""
        from .compare import tables

        return tables.runs(self.study)

    @property
    def differences(self) -> pd.DataFrame:
        """One row per comparison of an arm with the reference: mean, 95 % interval, p, corrected p."""
        from .compare import tables

        return tables.differences(self.found)


def load(root: Path | str) -> Run:
    """Load a run from its folder."""
    return Run(root)


def runs(folder: Path | str = "runs") -> pd.DataFrame:
    """Every run at or below a folder, jobs of sweeps included, in the order of their start.

    The index is each run's folder, for `load`. Columns: name, started, steps, the keys in which the runs differ, the last value
    of every metric (for training losses the mean over the last tenth), and cost: seconds, MiB (0 for an unfinished run).
    """
    import pandas as pd

    from .compare import arms
    from .compare import runs as reading

    found: list[reading.Run] = []
    for path in sorted(Path(folder).expanduser().rglob("config.yaml")):
        try:
            found += [reading.run_of(RunFolder(path.parent))] if RunFolder(path.parent).environment.is_file() else []
        except (YAMLError, ValueError):  # damaged by a kill or an edit
            continue
    found.sort(key=lambda run: str((run.folder.starts() or [{}])[0].get("started", "")))
    keys = arms.differing([run.values for run in found])
    rows = [_row(run, keys) for run in found]
    return pd.DataFrame(rows, index=pd.Index([str(run.folder.root) for run in found], name="run"))


def compare(*places: Run | Path | str, reference: str | None = None, average: Sequence[str] = ()) -> Comparison:
    """Compare runs, or those at or below some folders; runs that differ only in their seed form one arm.

    Args:
        reference: the arm that the others are compared with, by its name or a unique part of it; None: the first.
        average: keys such as dataset.subject, over which each seed's metrics are averaged.

    Raises:
        ConfigError: there are no runs, none has finished, or no arm has that name.
    """
    from . import compare as comparing
    from .compare import arms

    folders = [place.folder.root if isinstance(place, Run) else Path(place).expanduser() for place in places]
    study = comparing.led_by(arms.read(folders, average), reference)
    if not study.arms:
        raise ConfigError(f"no run of {', '.join(map(str, folders)) or 'those given'} has finished; there is nothing to compare")
    return Comparison(", ".join(folder.name for folder in folders), study, comparing.compared(study))


def compose(*overrides: str) -> DictConfig:
    """The configuration of a command line with these overrides, unchecked.

    Raises:
        ConfigError: an override can't be parsed, or names an unknown key.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    resolvers.register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            return hydra_compose("config", overrides=as_hydra_reads(overrides))
        except Exception as error:
            if (message := explain(error)) is None:
                raise
            raise ConfigError(message) from error


def train(cfg: DictConfig, root: Path | str) -> Run:
    """Train with a composed configuration, in a new folder.

    Raises:
        ConfigError: the configuration can't run; names the keys.
    """
    from .run import run

    cfg = resolve_paths(cfg)
    check(cfg)
    run(cfg, Path(root).expanduser())
    return load(root)


def build(cfg: DictConfig) -> tuple[DreamBooth, DreamBoothData]:
    """The LightningModule of a composed configuration before its first step, and its data, whose caches are filled.

    Raises:
        ConfigError: the configuration can't run; names the keys.
    """
    from .data.module import DreamBoothData
    from .factory import build_family, build_method

    cfg = resolve_paths(cfg)
    check(cfg)
    data = DreamBoothData(cfg, build_family(cfg))
    data.prepare()
    return build_method(cfg, data.family)[0], data


def _row(run: Any, keys: Sequence[str]) -> dict[str, Any]:
    """A run of `compare.arms` as one row of the table."""
    first = (run.folder.starts() or [{}])[0]
    steps = max((values[-1][0] for values in run.series.values()), default=0)
    known = {"name": run.values.get("name"), "started": first.get("started"), "steps": steps}
    return known | {key: run.values.get(key) for key in keys if key != "name"} | run.metrics | run.cost()
