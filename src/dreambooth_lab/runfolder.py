"""A run's folder: what lies where, how it is named, and how a run is taken up again. Imports no torch."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .config import Config, ConfigError, conf_dir

CHANGEABLE = ("trainer.max_steps", "trainer.log_every_n_steps", "trainer.progress", "trainer.accelerator", "cache",
              "validation", "eval", "preview", "webhook", "checkpoint", "export", "logger", "resume", "runs", "name",
              "preflight")  # fmt: skip
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
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.environment = self.root / "environment.json"
        self.preflight = self.root / "preflight.txt"
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

    def newest(self) -> tuple[Path, int] | None:
        """The newest checkpoint and its optimiser step."""
        return self._last("step_")

    def best(self) -> tuple[Path, int] | None:
        """The checkpoint that `checkpoint.monitor` kept, and its optimiser step."""
        return self._last("best_")

    def _last(self, prefix: str) -> tuple[Path, int] | None:
        found = sorted(self.checkpoints.glob(f"{prefix}*.ckpt"))
        return (found[-1], int(found[-1].stem.removeprefix(prefix))) if found else None

    def saved_config(self) -> DictConfig:
        """The run's configuration, typed by the schema.

        Raises:
            ConfigError: the folder holds no run.
        """
        if not self.config.is_file():
            raise ConfigError(f"{str(self.root)!r} is not a run folder: it has no {self.config.name}; give a folder below runs/")
        saved = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(self.config))
        assert isinstance(saved, DictConfig)
        return saved

    def save_config(self, cfg: DictConfig) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, self.config, resolve=True)

    def starts(self) -> list[dict[str, Any]]:
        """Every start of the run: when, where, with which command and versions, and what it took if it came to its end."""
        return json.loads(self.environment.read_text()) if self.environment.is_file() else []

    def save_cost(self, cost: dict[str, dict[str, float]]) -> None:
        """What the newest start took: phase → seconds, MiB."""
        starts = self.starts()
        starts[-1]["cost"] = cost
        self.environment.write_text(json.dumps(starts, indent=2) + "\n")

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
        self.environment.write_text(json.dumps(starts, indent=2) + "\n")

    def read_metrics(self) -> list[tuple[int, str, float]]:
        """Lines of metrics.csv as (step, name, value); a last line cut short by a kill is left out."""
        if not self.metrics.is_file():
            return []
        with self.metrics.open(newline="", encoding="utf-8") as file:
            text = file.read()
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [(int(step), name, float(value)) for step, name, value in list(csv.reader(whole))[1:]]


@cache
def new_folder(resume: str | None, runs: str, name: str) -> str:
    """OmegaConf resolver `run_folder`: the resumed run's folder, or a new one named by date and name."""
    if resume:
        return resume
    stem = Path(runs).expanduser() / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"
    taken = [stem, *(stem.with_name(f"{stem.name}_{i}") for i in range(2, 100))]
    return str(next(folder for folder in taken if not folder.exists()))


def take_up(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of a resumed run: the saved one, with what the command line says now.

    Args:
        cfg: composed from the command line, `resume` set.
        overrides: the command line's `key=value` words.

    Raises:
        ConfigError: a key that decides what is learned would change; lists them with both values.
    """
    folder = RunFolder(cfg.resume)
    saved = folder.saved_config()
    if folder.newest() is None:
        raise ConfigError(f"resume is {cfg.resume!r}, which has no checkpoint yet; start the run anew instead")
    result = saved.copy()
    for key in {word.lstrip("+~").split("=")[0].split("@")[0] for word in overrides}:
        if OmegaConf.is_missing(cfg, key) or (OmegaConf.select(cfg, key) is None and key not in cfg):
            continue
        OmegaConf.update(result, key, OmegaConf.select(cfg, key), merge=False)
    changed = list(_differences(OmegaConf.to_container(saved, resolve=True), OmegaConf.to_container(result, resolve=True)))
    refused = [(k, a, b) for k, a, b in changed if not any(k == ok or k.startswith(ok + ".") for ok in CHANGEABLE)]
    if refused:
        lines = [f"  - {k} was {_say(a)}, now {_say(b)}" for k, a, b in refused]
        raise ConfigError(
            "a resumed run continues bit for bit, so these can't change; leave them out, or start a new run:\n" + "\n".join(lines)
        )
    return result


def _say(value: Any) -> str:
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
