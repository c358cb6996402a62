"""What was counted before: the same network in the same use needs the same, so a second start counts nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..factory import build_family
from ..measurement_cache import cached_measurement
from ..models.checkpoint import skip_weights
from .counts import Network, Step, Visit, on_cpu

KINDS = {"Step": Step, "Visit": Visit}


class CachedCounts:
    """Counts by what they depend on, in memory and in a folder.

    Args:
        folder: where they are kept between runs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.counted: dict[str, Step | Visit] = {}
        self.settings: dict[str, str] = {}  # checkpoint → digest of its settings

    def count(self, count: Callable[..., Any], cfg: DictConfig, groups: tuple[str, ...], *sizes: int) -> Any:
        """What `count` says of a configuration and sizes.

        Args:
            groups: the part of the configuration that it depends on.
        """
        key = self._key(count.__name__, cfg, groups, sizes)
        if key not in self.counted:
            kind, values = cached_measurement(self.folder, key, lambda: _plain(count(cfg, *sizes)))
            self.counted[key] = KINDS[kind](*(Network(*value) if isinstance(value, list) else value for value in values))
        return self.counted[key]

    def _key(self, name: str, cfg: DictConfig, groups: tuple[str, ...], sizes: tuple[int, ...]) -> str:
        lines = [OmegaConf.select(cfg, group) for group in groups]
        shown = [OmegaConf.to_container(one, resolve=True) if OmegaConf.is_config(one) else one for one in lines]
        return repr((name, shown, sizes, self._settings(cfg)))

    def _settings(self, cfg: DictConfig) -> str:
        """Digest of the settings of a checkpoint's components."""
        place = f"{cfg.model.pretrained} {cfg.model.revision} {cfg.model.variant} {cfg.model.config}"
        if place not in self.settings:
            with skip_weights():
                folder: Path = build_family(on_cpu(cfg)).checkpoint.folder  # type: ignore[attr-defined]
            whole = hashlib.sha256()
            for path in sorted(folder.rglob("*.json")):
                whole.update(path.name.encode() + path.read_bytes())
            self.settings[place] = whole.hexdigest()
        return self.settings[place]


def _plain(counted: Step | Visit) -> tuple[str, list[Any]]:
    return type(counted).__name__, list(counted)
