"""How the checks read a composed configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

Bounds = tuple[tuple[Any, ...], ...]  # (key, least) or (key, least, most)


class Reader:
    """Reads keys for the checks; a missing value reads as None, since it is already reported by itself."""

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg

    def __call__(self, key: str) -> Any:
        return OmegaConf.select(self.cfg, key, default=None)

    def bounded(self, key: str, low: float, high: float = float("inf")) -> str | None:
        value = self(key)
        if value is None or low <= value <= high:
            return None
        legal = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        return f"{key} is {value}; it must be {legal}"

    def all_bounded(self, bounds: Bounds) -> Iterator[str | None]:
        return (self.bounded(*each) for each in bounds)

    def pictures(self, key: str, what: str) -> str | None:
        """A folder, or a URL of one, which is opened later."""
        return None if "://" in str(self(key)) else self.folder(key, what)

    def folder(self, key: str, what: str) -> str | None:
        value = self(key)
        if value is None or Path(value).expanduser().is_dir():
            return None
        state = "is a file" if Path(value).expanduser().exists() else "does not exist"
        return f"{key} is {value!r}, which {state}; it must be a folder with {what}"


def is_absent_folder(place: str | None) -> bool:
    """Whether a model's place can only be a folder, and isn't there; owner/name may be a hub id."""
    looks_local = bool(place) and (str(place).startswith((".", "/", "~")) or str(place).count("/") > 1)
    return looks_local and not Path(str(place)).expanduser().is_dir()
