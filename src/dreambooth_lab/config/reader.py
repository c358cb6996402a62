"""Access to a composed configuration for the checks."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


class Reader:
    """Reads keys for the checks; missing or unreadable keys are None, since they are already reported.

    Args:
        broken: keys whose values can't be read.
    """

    def __init__(self, cfg: DictConfig, broken: Collection[str] = ()):
        self.cfg, self.broken = cfg, broken

    def __call__(self, key: str) -> Any:
        return None if key in self.broken else OmegaConf.select(self.cfg, key, default=None)

    def pictures(self, key: str, what: str) -> str | None:
        """A problem if the key is not a folder; URLs are opened later."""
        return None if "://" in str(self(key)) else self.folder(key, what)

    def folder(self, key: str, what: str) -> str | None:
        value = self(key)
        if value is None or Path(value).expanduser().is_dir():
            return None
        state = "is a file" if Path(value).expanduser().exists() else "does not exist"
        return f"{key} is {value!r}, which {state}; it must be a folder with {what}"


def is_absent_folder(place: str | None) -> bool:
    """Whether a model's location can only be a folder, and does not exist; owner/name may be a hub id."""
    looks_local = bool(place) and (str(place).startswith((".", "/", "~")) or str(place).count("/") > 1)
    return looks_local and not Path(str(place)).expanduser().is_dir()


def installed(package: str) -> bool:
    """Whether a package can be imported; False for invalid names."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a.b without a, an empty or relative name
        return False
