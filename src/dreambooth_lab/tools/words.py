"""What the measuring commands share: their words are those of a training run."""

from __future__ import annotations

import sys
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf import DictConfig

from .. import lab
from ..config import ConfigError, anchor, check


def checked(words: list[str]) -> DictConfig:
    """The config of the training run that these words start. Raises `ConfigError` with everything wrong in it."""
    cfg: DictConfig = anchor(lab.compose(*words))
    check(cfg)
    return cfg


def command(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line's words; config problems end it without a traceback."""
    try:
        main(sys.argv[1:])
    except (ConfigError, HydraException) as error:
        sys.exit(f"error: {error}")
