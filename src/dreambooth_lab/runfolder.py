"""A run's folder: what lies where, how it is named, and how a run is taken up again. Imports no torch."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from .config import ConfigError, conf_dir, rows_per_batch, saved, set_schedule_length
from .storage import durable

log = logging.getLogger(__name__)

PART = ".part"  # ends the names of files that are being written
AUTO, LATEST = "auto", "latest"  # what `resume` may be besides a folder

CHANGEABLE = ("trainer.max_steps", "trainer.log_every_n_steps", "trainer.progress", "trainer.accelerator", "trainer.strategy",
              "optimizer.on_extend", "cache", "validation", "eval", "preview", "webhook", "checkpoint", "export", "logger",
              "resume", "runs", "name", "preflight", "search_metric", "sweep")  # fmt: skip
DIVISION = ("trainer.devices", "trainer.num_nodes", "dataset.batch_size")  # changeable if their product stays
METRICS_HEADER = ["step", "name", "value"]
PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "lycoris-lora",
    "optimum-quanto",
    "torchao",
    "bitsandbytes",
)


class RunFolder:
    """Paths below one run's folder; the only place that names them."""

    def __init__(self, root: Path | str):
        self.root = Path(root).expanduser()
        self.config = self.root / "config.yaml"
        self.environment = self.root / "environment.json"
        self.preflight = self.root / "preflight.txt"
        self.job = self.root / "job.json"  # of a sweep's job
        self.crops = self.root / "crops.png"
        self.metrics = self.root / "metrics.csv"
        self.scores = self.root / "scores.csv"
        self.eval = self.root / "eval.csv"
        self.pictures = self.root / "pictures"
        self.averaged = self.pictures / "ema"  # the average's, where both are drawn
        self.compared = self.pictures / "base_live_ema"
        self.base = self.pictures / "step_0000000.png"
        self.before_after = self.pictures / "before_after.png"
        self.checkpoints = self.root / "checkpoints"
        self.export = self.root / "export"
        self.best_export = self.root / "export_best"
        self.report = self.root / "report.html"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:07d}.ckpt"

    def best_checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"best_{step:07d}.ckpt"

    def all_checkpoints(self) -> list[Path]:
        """Those of the present weights, oldest first."""
        return sorted(self.checkpoints.glob("step_*.ckpt"))

    def newest(self) -> tuple[Path, int] | None:
        """The newest checkpoint and its optimiser step."""
        return self._last("step_")

    def newest_readable(self) -> tuple[Path, int]:
        """The newest checkpoint that can be read to its end; damaged newer ones are named.

        Raises:
            ConfigError: there is none.
        """
        for path in reversed(self.all_checkpoints()):
            if durable.is_complete_archive(path):
                return path, int(path.stem.removeprefix("step_"))
            log.warning("%s is damaged; going on from an older checkpoint", path)
        raise ConfigError(f"{str(self.root)!r} has no checkpoint that can be read; start the run anew without resume")

    def newest_picture(self, averaged: bool = False) -> Path | None:
        """The first picture of the newest look after step 0, the average's if there is one and it is asked for."""
        folders = [self.averaged, self.pictures] if averaged else [self.pictures]
        found = [sorted(folder.glob("step_*/00_00.png")) for folder in folders]
        paths = next((paths for paths in found if paths), [])
        return paths[-1] if paths and int(paths[-1].parent.name.removeprefix("step_")) > 0 else None

    def finish_writes(self) -> None:
        """Clean up after a process that was killed while it wrote."""
        for export in (self.export, self.best_export):
            durable.finish_replacement(export)
        for part in self.root.rglob(f"*{PART}"):
            part.unlink(missing_ok=True)

    def finish_writes_if_unused(self) -> None:
        """`finish_writes`, unless a process is writing to this run."""
        if held := durable.lock(self.root):
            try:
                self.finish_writes()
            finally:
                held.release()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other process writes to this run.

        Raises:
            ConfigError: one does.
        """
        held = durable.lock(self.root)
        if held is None:
            raise ConfigError(
                f"{str(self.root)!r} is being written by another process; wait until it ends or stop it, or start another run"
            )
        try:
            yield
        finally:
            held.release()

    def best(self) -> tuple[Path, int] | None:
        """The checkpoint that `checkpoint.monitor` kept, and its optimiser step."""
        return self._last("best_")

    def _last(self, prefix: str) -> tuple[Path, int] | None:
        found = sorted(self.checkpoints.glob(f"{prefix}*.ckpt"))
        return (found[-1], int(found[-1].stem.removeprefix(prefix))) if found else None

    def saved_config(self) -> DictConfig:
        """The run's configuration, typed by the schema; one that an earlier version wrote is read as this version's.

        Raises:
            ConfigError: the folder holds no run, or what it holds is damaged or of a later version.
        """
        if not self.config.is_file():
            raise ConfigError(f"{str(self.root)!r} is not a run folder: it has no {self.config.name}; give a folder below runs/")
        try:
            text = self.config.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{str(self.config)!r} is damaged ({error.reason})") from error
        return saved.load(text, repr(str(self.config)))

    def saved_values(self) -> dict[str, Any]:
        """The same as plain values, unchecked, in a tenth of the time."""
        return dict(yaml.load(self.config.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))

    def save_config(self, cfg: DictConfig) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        durable.write_text(self.config, saved.dump(cfg))

    def starts(self) -> list[dict[str, Any]]:
        """Every start of the run: when, where, with which command and versions, and what it took if it came to its end."""
        if not self.environment.is_file():
            return []
        try:
            return list(json.loads(self.environment.read_text(encoding="utf-8")))
        except ValueError:
            log.warning("%s is damaged; the list of starts begins anew", self.environment)
            return []

    def save_cost(self, cost: dict[str, dict[str, float]]) -> None:
        """What the newest start took: phase → seconds, MiB."""
        starts = self.starts()
        starts[-1]["cost"] = cost
        durable.write_text(self.environment, json.dumps(starts, indent=2) + "\n")

    def save_environment(self, device: str) -> None:
        """Append to the list of starts."""
        starts = self.starts()
        starts.append(
            {
                "started": datetime.now().astimezone().isoformat(timespec="seconds"),
                "command": [Path(sys.argv[0]).parent.name, *sys.argv[1:]],
                "commit": _commit(),
                "device": device,
                "platform": platform.platform(),
                "python": platform.python_version(),
                "packages": _versions(),
            }
        )
        durable.write_text(self.environment, json.dumps(starts, indent=2) + "\n")

    def read_metrics(self) -> list[tuple[int, str, float]]:
        """Lines of metrics.csv as (step, name, value); a last line cut short by a kill is left out."""
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [(int(step), name, float(value)) for step, name, value in list(csv.reader(whole))[1:]]


@cache
def new_folder(resume: str | None, runs: str, name: str, command: str = "") -> str:
    """OmegaConf resolver `run_folder`: the resumed run's folder, or a new one named by date and name, which no other process has.

    Args:
        resume: a run's folder; latest: the newest in `runs`; auto: that of this very command, made where there is none.
        command: the command line's words.
    """
    folder = Path(runs).expanduser()
    if resume == LATEST:
        found = sorted(path.parent for path in folder.glob("*/config.yaml"))
        return str(found[-1] if found else folder / LATEST)
    if resume == AUTO:
        words = sorted(word for word in command.split(",") if not word.startswith("resume="))
        return str(folder / f"{name}_{hashlib.sha256(','.join(words).encode()).hexdigest()[:12]}")
    return str(Path(resume).expanduser()) if resume else str(durable.claim(folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"))


def resume_config(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of a resumed run: the saved one, with what the command line says now.

    Args:
        cfg: composed from the command line, `resume` set.
        overrides: the command line's `key=value` words.

    Raises:
        ConfigError: a key that decides what is learned would change; lists them with both values. Or the run is made longer, and
            what its schedule then does is not said.
    """
    folder = RunFolder(cfg.resume)
    before = folder.saved_config()
    if folder.newest() is None:
        raise ConfigError(f"resume is {cfg.resume!r}, which has no checkpoint yet; start the run anew instead")
    result = before.copy()
    for key in {word.lstrip("+~").split("=")[0].split("@")[0] for word in overrides}:
        if OmegaConf.is_missing(cfg, key) or (OmegaConf.select(cfg, key) is None and key not in cfg):
            continue
        OmegaConf.update(result, key, OmegaConf.select(cfg, key), merge=False)
    changed = list(_differences(OmegaConf.to_container(before, resolve=True), OmegaConf.to_container(result, resolve=True)))
    may = (*CHANGEABLE, *DIVISION) if rows_per_batch(before) == rows_per_batch(result) else CHANGEABLE
    refused = [(k, a, b) for k, a, b in changed if not any(k == ok or k.startswith(ok + ".") for ok in may)]
    if refused:
        lines = [f"  - {k} was {_format(a)}, now {_format(b)}" for k, a, b in refused]
        raise ConfigError(
            "a resumed run continues bit for bit, so these can't change; leave them out, or start a new run"
            f"{_division(before, [key for key, *_ in refused])}:\n" + "\n".join(lines)
        )
    if said := set_schedule_length(before, result):
        log.info(said)
    return result


def _division(before: DictConfig, refused: list[str]) -> str:
    """How processes may change."""
    if not set(refused) & set(DIVISION):
        return ""
    return f" ({' times '.join(DIVISION)} may be divided otherwise if it stays {rows_per_batch(before)})"


def _format(value: Any) -> str:
    return repr(getattr(value, "name", value))


def _differences(old: Any, new: Any, prefix: str = "") -> Any:
    for key in old:
        path = f"{prefix}{key}"
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from _differences(old[key], new[key], path + ".")
        elif old[key] != new[key]:
            yield path, old[key], new[key]


def _versions() -> dict[str, str]:
    """Of the packages that are installed; some are extras."""
    there = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            there[name] = metadata.version(name)
    return there


def _commit() -> str | None:
    """Of the source checkout this package runs from, with + if it has changes; None for an installed wheel."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=conf_dir(), capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
