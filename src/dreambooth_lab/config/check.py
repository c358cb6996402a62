"""`check`: every problem of a composed configuration, reported at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import get_type_hints

from omegaconf import DictConfig

from . import adapter_rules, data_rules, division, learning_rules, monitoring_rules, ranges
from .reader import Reader
from .schema import Config
from .types import unreadable


class ConfigError(Exception):
    """A problem the user can fix; the message names the key, the value and a fix."""


class RunError(Exception):
    """A run can't continue. Files saved before are complete; the message says where, and names a fix."""


class Interrupted(RunError):
    """A run was stopped by a signal after saving its state.

    Args:
        signal: the number of the signal.
    """

    def __init__(self, text: str, signal: int):
        super().__init__(text)
        self.signal = signal


class Lost(RunError):
    """A run of a sweep was stopped because another arm leads (`race`). It is saved where it was."""


def check(cfg: DictConfig) -> None:
    """Raise one `ConfigError` that lists every problem of a composed config; do nothing if there is none."""
    broken = list(unreadable(cfg))
    keys = {key for key, _ in broken}
    found = [problem for _, problem in broken if problem] + list(_unknown_keys(cfg))
    found += [text for text in _problems(Reader(cfg, keys)) if text and text.split()[0] not in keys]
    if found:
        raise ConfigError(f"{len(found)} problem(s) in the configuration:\n" + "\n".join(f"  - {p}" for p in found))


def _unknown_keys(node: DictConfig, schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Keys outside the schema, which `+key=…` adds silently."""
    legal = get_type_hints(schema)
    for key in map(str, node):
        if key not in legal:
            near = get_close_matches(key, legal, n=1)
            yield f"{prefix}{key} is not a key of this project" + (f"; did you mean {prefix}{near[0]}?" if near else "")
        elif is_dataclass(legal[key]) and isinstance(child := node._get_node(key), DictConfig):
            yield from _unknown_keys(child, legal[key], f"{prefix}{key}.")


def _problems(read: Reader) -> Iterator[str | None]:
    """All checks that types can't express."""
    for rules in (ranges, data_rules, adapter_rules, learning_rules, monitoring_rules, division):
        yield from rules.problems(read)
    if read("preflight") not in (None, "run", "only"):
        yield f"preflight is {read('preflight')!r}; it must be run, or only (stop before training)"
    if read("resume") is not None:
        yield read.folder("resume", "an earlier run of this project")
    if not str(read("name") or "x").replace("-", "").replace("_", "").isalnum():
        yield f"name is {read('name')!r}; it is part of a folder's name, so only letters, digits, - and _ are allowed"
