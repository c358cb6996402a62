"""The configuration of a resumed run: which keys may change. Imports no torch."""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .config import ConfigError, rows_per_batch, set_schedule_length
from .runfolder import RunFolder

log = logging.getLogger(__name__)

CHANGEABLE = ("trainer.max_steps", "trainer.log_every_n_steps", "trainer.progress", "trainer.accelerator", "trainer.strategy",
              "optimizer.on_extend", "cache", "validation", "eval", "preview", "webhook", "checkpoint", "export", "logger",
              "resume", "runs", "name", "preflight", "search_metric", "race")  # fmt: skip
DIVISION = ("trainer.devices", "trainer.num_nodes", "dataset.batch_size")  # changeable if their product stays the same


def resume_config(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of a resumed run: the saved one with the overrides of the command line.

    Args:
        cfg: composed from the command line, `resume` set.
        overrides: the command line's `key=value` arguments.

    Raises:
        ConfigError: a key that affects the trained weights would change; lists them with both values. Or the run is made longer,
            and `optimizer.on_extend` is not set.
    """
    folder = RunFolder(cfg.resume)
    before = folder.saved_config()
    if folder.newest() is None:
        raise ConfigError(f"resume is {cfg.resume!r}, which has no checkpoint yet; start a new run instead")
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
    if notice := set_schedule_length(before, result):
        log.info(notice)
    return result


def _division(before: DictConfig, refused: list[str]) -> str:
    """Which keys of the processes may change."""
    if not set(refused) & set(DIVISION):
        return ""
    return f" ({' times '.join(DIVISION)} may change if their product stays {rows_per_batch(before)})"


def _format(value: Any) -> str:
    return repr(getattr(value, "name", value))


def _differences(old: Any, new: Any, prefix: str = "") -> Any:
    for key in old:
        path = f"{prefix}{key}"
        if isinstance(old[key], dict) and isinstance(new[key], dict):
            yield from _differences(old[key], new[key], path + ".")
        elif old[key] != new[key]:
            yield path, old[key], new[key]
