"""Shared code of the tools that take the arguments of a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from omegaconf import DictConfig

from ... import lab
from ...config import check, resolve_paths
from . import cli


def compose_checked(words: list[str]) -> DictConfig:
    """The config of a training run with these arguments. Raises `ConfigError` with all problems."""

    def compose(more: Sequence[str] = ()) -> DictConfig:
        made: DictConfig = resolve_paths(lab.compose(*words, *more))
        check(made)
        return made

    cfg = compose()
    if not cfg.memory.plans:
        return cfg
    from ...forecast import plans

    chosen = plans.choose_plan(cfg, words, compose)
    return chosen.cfg if chosen else cfg


def command(main: Callable[[list[str]], None], doc: str | None, words: list[str] | None = None) -> None:
    """The command line of a tool that takes only such arguments.

    Args:
        words: None: the process's own.
    """
    application = cli.app()

    @application.command(help=cli.text(doc))
    def _(
        overrides: Annotated[list[str] | None, typer.Argument(help="as for a training run", metavar="KEY=VALUE …")] = None,
    ) -> None:
        main(overrides or [])

    cli.run(lambda: application(words))
