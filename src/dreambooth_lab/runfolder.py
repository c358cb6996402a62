"""A run's folder: its files and their names. Imports no torch."""

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
from omegaconf import DictConfig

from .config import ConfigError, conf_dir, saved
from .storage import durable

log = logging.getLogger(__name__)

PART = ".part"  # suffix of files that are being written
COST, STOPPED_COST = "cost", "cost_until_stopped"  # of a start: the first if the run finished
FLOPS = "flops_per_step"  # of a start, where they were counted
AUTO, LATEST = "auto", "latest"  # values of `resume` other than a folder

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
    """Paths below one run's folder, which are named only here."""

    def __init__(self, root: Path | str):
        self.root = Path(root).expanduser()
        self.config = self.root / "config.yaml"
        self.environment = self.root / "environment.json"
        self.preflight = self.root / "preflight.txt"
        self.job = self.root / "job.json"  # for a sweep's job
        self.crops = self.root / "crops.png"
        self.metrics = self.root / "metrics.csv"
        self.scores = self.root / "scores.csv"
        self.eval = self.root / "eval.csv"
        self.leakage = self.root / "leakage.csv"
        self.image_folder = _existing(self.root / "pictures", self.root / "images")
        self.averaged = self.image_folder / "ema"  # images of the average, if both are generated
        self.compared = self.image_folder / "base_live_ema"
        self.base = self.image_folder / "step_0000000.png"
        self.before_after = self.image_folder / "before_after.png"
        self.checkpoints = self.root / "checkpoints"
        self.averages = self.root / "averages"  # snapshots of power-function averages
        self.export = self.root / "export"
        self.best_export = self.root / "export_best"
        self.report = self.root / "report.html"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:07d}.ckpt"

    def best_checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"best_{step:07d}.ckpt"

    def snapshot(self, step: int, length: float) -> Path:
        return self.averages / f"step_{step:07d}_length_{length:g}.safetensors"

    def snapshots(self) -> dict[tuple[int, float], Path]:
        """Step and length of each snapshot of a power-function average → its file."""
        found = ((path, path.stem.removeprefix("step_").split("_length_")) for path in self.averages.glob("step_*.safetensors"))
        return {(int(step), float(length)): path for path, (step, length) in sorted(found)}

    def all_checkpoints(self) -> list[Path]:
        """The checkpoints of the current weights, oldest first."""
        return sorted(self.checkpoints.glob("step_*.ckpt"))

    def newest(self) -> tuple[Path, int] | None:
        """The newest checkpoint and its optimiser step."""
        return self._last("step_")

    def newest_readable(self) -> tuple[Path, int]:
        """The newest intact checkpoint; damaged newer ones are logged.

        Raises:
            ConfigError: there is none.
        """
        for path in reversed(self.all_checkpoints()):
            if durable.is_complete_archive(path):
                return path, int(path.stem.removeprefix("step_"))
            log.warning("%s is damaged; resuming from an older checkpoint", path)
        raise ConfigError(f"{str(self.root)!r} has no readable checkpoint; start a new run without resume")

    def newest_image(self, averaged: bool = False) -> Path | None:
        """The first image of the newest validation after step 0; the average's if it exists and is requested."""
        folders = [self.averaged, self.image_folder] if averaged else [self.image_folder]
        found = [sorted(folder.glob("step_*/00_00.png")) for folder in folders]
        paths = next((paths for paths in found if paths), [])
        return paths[-1] if paths and int(paths[-1].parent.name.removeprefix("step_")) > 0 else None

    def finish_writes(self) -> None:
        """Clean up after a process that was killed while writing."""
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
        """A context in which no other process writes to this run.

        Raises:
            ConfigError: another process is writing.
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
        """The best checkpoint by `checkpoint.monitor`, and its optimiser step."""
        return self._last("best_")

    def _last(self, prefix: str) -> tuple[Path, int] | None:
        found = sorted(self.checkpoints.glob(f"{prefix}*.ckpt"))
        return (found[-1], int(found[-1].stem.removeprefix(prefix))) if found else None

    def saved_config(self) -> DictConfig:
        """The run's configuration, typed by the schema; configurations of earlier versions are migrated.

        Raises:
            ConfigError: the folder holds no run, or its configuration is damaged or of a later version.
        """
        if not self.config.is_file():
            raise ConfigError(f"{str(self.root)!r} is not a run folder: it has no {self.config.name}; give a folder below runs/")
        try:
            text = self.config.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{str(self.config)!r} is damaged ({error.reason})") from error
        return saved.load(text, repr(str(self.config)))

    def saved_values(self) -> dict[str, Any]:
        """The same as plain values, unchecked; ten times as fast."""
        return dict(yaml.load(self.config.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))

    def save_config(self, cfg: DictConfig) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        durable.write_text(self.config, saved.dump(cfg))

    def starts(self) -> list[dict[str, Any]]:
        """Every start of the run: date, machine, command, versions, and time and memory if it finished."""
        if not self.environment.is_file():
            return []
        try:
            return list(json.loads(self.environment.read_text(encoding="utf-8")))
        except ValueError:
            log.warning("%s is damaged; starting a new list of starts", self.environment)
            return []

    def costs(self) -> list[tuple[str, dict[str, dict[str, float]]]]:
        """(date, phase → seconds, MiB) of each start that finished or was stopped; what a killed one took is not known."""
        return [(start["started"], start[key]) for start in self.starts() for key in (COST, STOPPED_COST) if key in start]

    def save_cost(self, cost: dict[str, dict[str, float]], key: str = COST) -> None:
        """Time and memory of the newest start: phase → seconds, MiB."""
        starts = self.starts()
        starts[-1][key] = cost
        durable.write_text(self.environment, json.dumps(starts, indent=2) + "\n")

    def save_flops(self, flops: float) -> None:
        """FLOPs of an optimiser step."""
        starts = self.starts()
        starts[-1][FLOPS] = flops
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
        """Lines of metrics.csv as (step, name, value); an incomplete last line is skipped."""
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [(int(step), name, float(value)) for step, name, value in list(csv.reader(whole))[1:]]


@cache
def new_folder(resume: str | None, runs: str, name: str, command: str = "") -> str:
    """OmegaConf resolver `run_folder`: the resumed run's folder, or a new unique one named by date and name.

    Args:
        resume: a run's folder; latest: the newest in `runs`; auto: that of this same command, created if there is none.
        command: the command line's arguments.
    """
    folder = Path(runs).expanduser()
    if resume == LATEST:
        found = sorted(path.parent for path in folder.glob("*/config.yaml"))
        return str(found[-1] if found else folder / LATEST)
    if resume == AUTO:
        words = sorted(word for word in command.split(",") if not word.startswith("resume="))
        return str(folder / f"{name}_{hashlib.sha256(','.join(words).encode()).hexdigest()[:12]}")
    return str(Path(resume).expanduser()) if resume else str(durable.claim(folder / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"))


def _existing(old: Path, new: Path) -> Path:
    """The folder's former name in runs that began under it."""
    return old if old.is_dir() and not new.is_dir() else new


def _versions() -> dict[str, str]:
    """Versions of the installed packages; some are extras."""
    there = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            there[name] = metadata.version(name)
    return there


def _commit() -> str | None:
    """The commit of the source checkout, with + if it has changes; None for an installed wheel."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=conf_dir(), capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
