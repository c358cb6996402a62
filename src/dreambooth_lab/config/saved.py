"""Configurations as text, in run folders and in the headers of exports: resolved, with the version of their format.

All values are written literally. Nothing in such a text refers to another key or to environment variables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .check import ConfigError
from .migrations import VERSION, migrate
from .schema import Config

KEY = "config_version"
UNREADABLE = (OmegaConfBaseException, YAMLError, UnicodeDecodeError, ValueError, TypeError)


def dump(cfg: DictConfig) -> str:
    """A configuration as YAML, every `${…}` replaced by its value."""
    return f"{KEY}: {VERSION}\n{OmegaConf.to_yaml(cfg, resolve=True)}"


def load(text: str, place: str) -> DictConfig:
    """A configuration that `dump` wrote, in this or an earlier version, typed by the schema.

    Args:
        place: its location, for errors.

    Raises:
        ConfigError: it is damaged, or of a later version.
    """
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        version = tree.pop(KEY, 0)
        if version > VERSION:
            later = f"{place} was written by a later version of this project (configuration {version}, here {VERSION})"
            raise ConfigError(f"{later}; update this project")
        made = OmegaConf.merge(OmegaConf.structured(Config), literal(migrate(tree, version)))
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{place} is damaged or of another version of this project ({reason})") from error
    assert isinstance(made, DictConfig)
    return made


def literal(value: Any) -> Any:
    """Escape values for OmegaConf, so that a ${ in a text remains text."""
    if isinstance(value, Mapping):
        return {key: literal(child) for key, child in value.items()}
    if isinstance(value, list):
        return [literal(child) for child in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
