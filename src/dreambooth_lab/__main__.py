"""The command line: `python -m dreambooth_lab key=value …`. Imports no torch, so help and refusals are instant."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from dreambooth_lab import heap, resolvers, sweep
from dreambooth_lab.config import ConfigError, Interrupted, Lost, RunError, check, conf_dir, processes, resolve_paths
from dreambooth_lab.config.help import page as help_page
from dreambooth_lab.config.hydra_errors import explain
from dreambooth_lab.config.typed import as_hydra_reads
from dreambooth_lab.data.planning import plan
from dreambooth_lab.library_warnings import silence_libraries
from dreambooth_lab.pages import Pages
from dreambooth_lab.resuming import resume_config
from dreambooth_lab.runfolder import AUTO, LATEST, RunFolder
from dreambooth_lab.storage import disk, durable
from dreambooth_lab.sweep import JobFailed, State

FULL = 2**20  # a disk with fewer free bytes is full
FULL_ERROR = "HYDRA_FULL_ERROR"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

resolvers.register()


def job(cfg: DictConfig) -> dict[str, float]:
    """Compose → check → run one Hydra job."""
    hydra_cfg = HydraConfig.get()
    cfg, folder = resolve_paths(cfg), RunFolder(hydra_cfg.runtime.output_dir)
    cfg = with_saved_config(cfg, folder, list(hydra_cfg.overrides.task))
    check(cfg)
    if hydra_cfg.mode is RunMode.MULTIRUN and "optuna" in hydra_cfg.sweeper._target_ and cfg.search_metric is None:
        raise ConfigError("hydra/sweeper is optuna, but search_metric is null; set it to a logged number, such as eval/loss")
    if cfg.race:
        _check_race(cfg, folder)
    own = any(word.startswith("hydra.run.dir=") for word in hydra_cfg.overrides.hydra)
    if cfg.trainer.num_nodes > 1 and cfg.resume is None and not own:
        several = f"trainer.num_nodes is {cfg.trainer.num_nodes}, and each machine would choose its own run folder"
        raise ConfigError(f"{several}; set a shared one: hydra.run.dir=FOLDER, or resume=auto")
    if processes(cfg) > 1 and hydra_cfg.mode is RunMode.MULTIRUN:
        several = f"trainer.devices is {cfg.trainer.devices} in a sweep, where each job has one process"
        raise ConfigError(f"{several}; start the jobs one by one (hydra.mode=RUN), or set trainer.devices=1")
    plan(cfg)  # a wrong dataset file is refused before torch and the rest load
    silence_libraries()
    with heap.imports():
        from dreambooth_lab.run import run  # torch and the rest load here

    cfg, tables = with_memory_plan(cfg, list(hydra_cfg.overrides.task), str(hydra_cfg.job.config_name))
    return run(cfg, folder.root, tables)


def _check_race(cfg: DictConfig, folder: RunFolder) -> None:
    """Raise `ConfigError` where no other run can be raced against."""
    said = f"race is {cfg.race}"
    if sweep.recorded(folder) is None:
        raise ConfigError(f"{said}, but this is a single run; start a sweep (-m, or sweep=NAME), or leave it out")
    if HydraConfig.get().mode is RunMode.MULTIRUN and "optuna" in HydraConfig.get().sweeper._target_:
        raise ConfigError(f"{said}, but Optuna needs the whole of each run; leave one of them out")


def with_memory_plan(cfg: DictConfig, overrides: list[str], name: str) -> tuple[DictConfig, list[Any]]:
    """The configuration with what `memory` chooses for the card, and the table to show; a resumed run keeps its choice."""
    if cfg.resume:
        return cfg, []
    from dreambooth_lab.forecast import plans

    def compose(words: Sequence[str]) -> DictConfig:
        with_more: DictConfig = resolve_paths(hydra.compose(name, overrides=[*overrides, *words]))
        check(with_more)
        return with_more

    chosen = plans.choose_plan(cfg, overrides, compose)
    if chosen is None:
        return cfg, []
    chosen.show()
    return chosen.cfg, [chosen.table()]


def with_saved_config(cfg: DictConfig, folder: RunFolder, overrides: list[str]) -> DictConfig:
    """The configuration to run: as composed, or with `resume` the saved one of the run in the folder."""
    if cfg.resume is None:
        return cfg
    if HydraConfig.get().mode is RunMode.MULTIRUN and cfg.resume != AUTO:
        way_out = "resume=auto resumes the sweep of the same command, hydra.mode=RUN resume=FOLDER one of its runs"
        raise ConfigError(f"resume is {cfg.resume!r} in a sweep; {way_out}")
    if cfg.resume in (AUTO, LATEST):
        began = cfg.resume == LATEST or folder.newest() is not None
        cfg.resume = str(folder.root) if began else None
    return resume_config(cfg, overrides) if cfg.resume else cfg


def task(cfg: DictConfig) -> dict[str, float] | float | None:
    """Hydra's entry point: a single run, or one job of a sweep."""
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        return _job_or_exit(cfg)
    numbers = _member(cfg)
    return numbers if cfg.search_metric is None else _searched(cfg.search_metric)


def _searched(metric: str) -> float:
    """The objective of a job of a search: the metric as the sweep's page has it.

    Raises:
        JobFailed: the job did not log this metric.
    """
    from dreambooth_lab.compare import runs

    numbers = runs.run_of(RunFolder(HydraConfig.get().runtime.output_dir)).metrics
    if metric not in numbers:
        reason = f"search_metric is {metric!r}, which this run does not log; it logs {', '.join(sorted(numbers)) or 'nothing'}"
        print(f"error: {reason}", file=sys.stderr)
        raise JobFailed(reason)
    return numbers[metric]


def _job_or_exit(cfg: DictConfig) -> dict[str, float] | None:
    """Run a job; a refused configuration prints its message and exits with code 2."""
    try:
        return job(cfg)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        _drop_if_empty(Path(HydraConfig.get().runtime.output_dir))
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print(f"interrupted; {_how_to_resume('resume')}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        print(f"error: {error}; {_how_to_resume('free disk space or give write access, then resume')}", file=sys.stderr)
        sys.exit(1)


def _member(cfg: DictConfig) -> dict[str, float]:
    """One job of a sweep. A failure is printed and recorded in its folder, and the other jobs run; a signal ends the sweep.

    Raises:
        JobFailed: the job failed; for Hydra.
    """
    hydra_cfg = HydraConfig.get()
    folder = RunFolder(hydra_cfg.runtime.output_dir)
    if cfg.resume == AUTO and (numbers := sweep.finished(folder)) is not None:
        print(f"job {hydra_cfg.job.num} is already done: {folder.root}", flush=True)
        sweep.note(folder, State.done, hydra_cfg)
        return numbers
    if cfg.resume == AUTO and (known := sweep.recorded(folder)) and known.state == State.lost:
        print(f"job {hydra_cfg.job.num} has lost the race already: {folder.root}", flush=True)
        return _last_numbers(folder)
    sweep.note(folder, State.began, hydra_cfg)
    try:
        numbers = job(cfg)
        sweep.note(folder, State.previewed if cfg.preflight == "only" else State.done, hydra_cfg)
        return numbers
    except (Interrupted, KeyboardInterrupt) as stop:
        sweep.note(folder, State.stopped, hydra_cfg)
        print(f"{stop}\nthe sweep was stopped; {_whole_sweep_on(cfg)}", file=sys.stderr)
        sys.exit(128 + (stop.signal if isinstance(stop, Interrupted) else signal.SIGINT))
    except Lost as stop:
        sweep.note(folder, State.lost, hydra_cfg, str(stop))
        print(f"job {hydra_cfg.job.num}: {stop}", flush=True)
        return _last_numbers(folder)
    except (ConfigError, RunError) as error:
        reason = str(error)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    finally:
        _release()
    _release()  # what the exception referenced until here
    sweep.note(folder, State.failed, hydra_cfg, reason)
    print(f"error in job {hydra_cfg.job.num}: {reason}\nthe other jobs continue", file=sys.stderr)
    raise JobFailed(reason)


def _last_numbers(folder: RunFolder) -> dict[str, float]:
    return {name: value for _, name, value in folder.read_metrics()}


def _release() -> None:
    """Free everything this job allocated, for the next job in this process."""
    if "torch" not in sys.modules:  # the job was refused before torch loaded
        return
    from dreambooth_lab.run import release

    release()


def _whole_sweep_on(cfg: DictConfig) -> str:
    return (
        f"the same command resumes it{'' if cfg.resume == AUTO else ', if it was started with resume=auto, as with sweep=NAME'}"
    )


def _is_of_the_disk(error: Exception) -> bool:
    """Whether a file could not be written; libraries raise exceptions of their own for this."""
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    return disk.free_bytes(Path(HydraConfig.get().runtime.output_dir)) < FULL


def _how_to_resume(what: str) -> str:
    folder = RunFolder(HydraConfig.get().runtime.output_dir)
    if folder.newest():
        return f"{what} with: python -m dreambooth_lab resume={folder.root}"
    return "no step was saved yet; the caches are kept, so the same command starts faster"


def _drop_if_empty(folder: Path) -> None:
    """Remove the folder of a run that never started."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [durable.LOCK]:
            (folder / durable.LOCK).unlink()
        folder.rmdir()


def main() -> None:
    """The command line. With HYDRA_FULL_ERROR=1 a configuration error shows its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal or log that can't encode é or … gets a ?
    wants_traceback = os.environ.get(FULL_ERROR, "0") != "0"
    os.environ[FULL_ERROR] = "1"  # so that Hydra leaves errors to us
    try:
        if (shown := help_page(sys.argv[1:])) is not None:
            print(shown, end="")
            return
        sys.argv[1:] = as_hydra_reads(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except JobFailed:
        sys.exit(1)  # the error has been printed
    except Exception as error:
        message = explain(error)
        if message is None or wants_traceback:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        Pages.close()


if __name__ == "__main__":
    main()
