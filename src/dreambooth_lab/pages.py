"""A Hydra callback that writes a sweep's page after each job and at the end. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from . import resolvers, sweep
from .config import ConfigError, check, resolve_paths
from .runfolder import AUTO
from .storage import durable

resolvers.register()  # also in the other processes of a sweep, which import this with the callback


class Pages(Callback):
    """Hydra creates one in each process; jobs of any launcher call `on_job_end` in their own process."""

    started: ClassVar[Path | None] = None  # the sweep that this process started

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Pages.started = Path(config.hydra.sweep.dir).resolve()
        sweep.begin(Pages.started, config)
        print(f"sweep: {Pages.started}", flush=True)
        for words, text in refused(config):
            print(f"warning: this job will be refused: {' '.join(words)}\n{text}", file=sys.stderr, flush=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            folder = Path(config.hydra.sweep.dir)
            if sweep.news(folder):
                refresh(folder)

    @classmethod
    def close(cls) -> None:
        """Print the results of the sweep that this process started, if it did."""
        folder, cls.started = cls.started, None
        if folder is None:
            return
        if not sweep.jobs(folder):
            sweep.drop(folder)
            return
        page = refresh(folder)
        Console().print(sweep.table(folder))
        print(f"page: {page}" if page else "no page: no job has metrics yet", flush=True)


def refused(config: DictConfig) -> Iterator[tuple[list[str], str]]:
    """Overrides of the jobs whose configurations can't run, and the reasons, before the first job; only for grids."""
    if not config.hydra.sweeper._target_.endswith(BasicSweeper.__name__):
        return
    lines = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    grid = BasicSweeper.split_arguments(parser.parse_overrides([*lines, *config.hydra.overrides.task]), None)
    for words in chain.from_iterable(grid):
        cfg = resolve_paths(hydra.compose(config.hydra.job.config_name, overrides=list(words)))
        cfg.resume = None if cfg.resume == AUTO else cfg.resume
        try:
            check(cfg)
        except ConfigError as error:
            yield sweep.varied(Pages.started or Path(), words), str(error)


def refresh(folder: Path) -> Path | None:
    """Write a sweep's page again; one process at a time. None: nothing to show yet."""
    from . import compare  # pandas and the like load here

    held = durable.lock(folder)
    if held is None:  # another job has just ended and writes it; the sweep's end writes it once more
        return None
    try:
        return compare.write([folder], folder)
    finally:
        held.release()
