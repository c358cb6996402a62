"""The jobs of a sweep: their folders, which are done, and their results. Imports no torch.

A job is identified by its configuration: its folder's name ends in a digest of it. So the same job finds its folder whatever its
number, and a restarted sweep runs only the missing jobs. Each job has its own record, so that jobs can run in several processes
or on several machines that share the sweep's folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from .config import RunError, resolve_paths
from .runfolder import AUTO, COST, RunFolder, new_folder
from .storage import durable

KEYS = "sweep.json"  # in the sweep's folder: the varied keys
PAGE = "compare.html"  # in the same folder
OLD_MESSAGE = "told"  # a record's key for `message` in earlier versions
PACKAGE = Path(__file__).parent  # holds the embedded base model and photos
LONGEST = 80  # characters of a job's overrides in its folder's name
# Keys that affect where a run writes and reports, not its training or metrics.
ASIDE = ("resume", "runs", "cache", "preflight", "search_metric", "name", "logger", "webhook", "preview", "race",
         "trainer.progress")  # fmt: skip


class State(StrEnum):
    began = "began"  # and has not finished: it is running, or was killed
    previewed = "preflight only"
    done = "done"
    stopped = "stopped"
    failed = "failed"
    lost = "lost"  # a race (`race`)


class Job(NamedTuple):
    """A job's record, in its folder."""

    number: int  # Hydra's, of the newest start
    words: list[str]  # its overrides in the sweep
    state: str
    message: str = ""  # why it failed or lost


class JobFailed(RunError):
    """A job of a sweep failed. Holds no reference to the job's objects, so its memory can be freed for the next."""


def sweep_folder(resume: str | None, runs: str, name: str, command: str) -> str:
    """OmegaConf resolver: with `resume=auto` the folder of the sweep of this same command, otherwise a new one."""
    return new_folder(AUTO if resume == AUTO else None, runs, name, command)


def job_folder(sweep: str, number: int, *, _root_: DictConfig) -> str:
    """OmegaConf resolver: the name of a job's folder in its sweep's, from number, overrides and digest; an existing one is
    reused."""
    mark = digest(_root_)
    there = sorted(Path(sweep).glob(f"*_{mark}"))
    if there:
        return there[0].name
    words = "_".join(_plain(word) for word in varied(Path(sweep), _words(_root_)))[:LONGEST].strip("-_")
    return "_".join(filter(None, (str(number), words, mark)))


def digest(cfg: DictConfig) -> str:
    """A digest of all keys that affect a job's training and metrics, wherever this package is installed."""
    own = OmegaConf.masked_copy(cfg, [key for key in map(str, cfg) if key != "hydra"])
    try:
        values: Any = OmegaConf.to_container(resolve_paths(own), resolve=True)
    except OmegaConfBaseException:  # `check` reports it when the job runs
        values = OmegaConf.to_container(own)
    for group, _, key in (path.partition(".") for path in ASIDE):
        (values.get(group, {}) if key else values).pop(key or group, None)
    text = json.dumps(values, sort_keys=True, default=str).replace(json.dumps(str(PACKAGE))[1:-1], PACKAGE.name)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def varied(sweep: Path, words: Sequence[str]) -> list[str]:
    """The overrides of a job that the sweep varies."""
    if not (sweep / KEYS).is_file():
        return []
    keys = json.loads((sweep / KEYS).read_text(encoding="utf-8"))
    return [word for word in words if _key(word) in keys]


def begin(sweep: Path, config: DictConfig) -> None:
    """Write the keys that a sweep varies: those of its file, and those of the command line with several values."""
    overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    keys = [*(config.hydra.sweeper.get("params") or {}), *(word.key_or_group for word in overrides if word.is_sweep_override())]
    sweep.mkdir(parents=True, exist_ok=True)
    durable.write_text(sweep / KEYS, json.dumps(sorted({key.lstrip("+") for key in keys})) + "\n")


def finished(folder: RunFolder) -> dict[str, float] | None:
    """The last metrics of a finished run; None for an unfinished one."""
    starts = folder.starts()
    if not (starts and COST in starts[-1]):
        return None
    return {name: value for _, name, value in folder.read_metrics()}


def note(folder: RunFolder, state: State, job: HydraConf, message: str = "") -> None:
    """Write a job's result to its record.

    Args:
        job: Hydra's part of its configuration.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    words = varied(folder.root.parent, list(job.overrides.task))
    made = Job(int(job.job.num), words, state, message)
    if made != recorded(folder):
        durable.write_text(folder.job, json.dumps(made._asdict(), indent=2) + "\n")


def jobs(sweep: Path) -> list[tuple[RunFolder, Job]]:
    """All jobs that were started in a sweep's folder, by number."""
    folders = [RunFolder(path) for path in sorted(sweep.glob("*/"))]
    found = [(folder, job) for folder in folders if (job := recorded(folder))]
    return sorted(found, key=lambda pair: pair[1].number)


def recorded(folder: RunFolder) -> Job | None:
    """The record of a job's folder; None if it is not a job of a sweep."""
    if not folder.job.is_file():
        return None
    record = json.loads(folder.job.read_text(encoding="utf-8"))
    record.setdefault("message", record.pop(OLD_MESSAGE, ""))
    return Job(**record)


def news(sweep: Path) -> bool:
    """Whether a job's record has changed since the sweep's page was written."""
    page = sweep / PAGE
    return not page.is_file() or any(folder.job.stat().st_mtime >= page.stat().st_mtime for folder, _ in jobs(sweep))


def table(sweep: Path) -> Table:
    """A table of all jobs and their results."""
    made = Table("job", "words", "state", "steps", "why", title=f"The sweep in {sweep}", title_justify="left")
    for folder, job in jobs(sweep):
        steps = max((step for step, _, _ in folder.read_metrics()), default=0)
        made.add_row(str(job.number), " ".join(job.words), str(job.state), f"{steps:,}", " ".join(job.message.split()))
    return made


def _words(cfg: DictConfig) -> list[str]:
    return list(OmegaConf.to_container(cfg.hydra.overrides.task))  # type: ignore[arg-type]


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def _plain(word: str) -> str:
    """The last part of the key and the value, in characters that are valid on every file system."""
    key, _, value = word.lstrip("+~").partition("=")
    return "-".join(filter(None, re.sub(r"[^\w.]+", "-", f"{key.rpartition('.')[2]} {value}", flags=re.ASCII).split("-")))


def drop(sweep: Path) -> None:
    """Remove the folder of a sweep in which no job was started."""
    for name in (KEYS, "multirun.yaml"):
        (sweep / name).unlink(missing_ok=True)
    with suppress(OSError):
        sweep.rmdir()
