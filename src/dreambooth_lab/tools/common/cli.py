"""Shared code of the command-line tools: option spelling, errors, exit codes.

Options may be written with dashes or underscores. A tool exits with 0 for success, 1 when something was not found or is not
complete, 2 for wrong arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from ...config import ConfigError


def app(**options: Any) -> typer.Typer:
    """An application with one or several commands."""
    spelling = {"token_normalize_func": lambda word: word.replace("_", "-")}
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=spelling, **options)


def text(doc: str | None) -> str:
    """A module's docstring as a command's help: paragraphs that are indented keep their lines."""
    parts = (doc or "").split("\n\n")
    return "\n\n".join(f"\b\n{part}" if part.startswith(" ") else " ".join(part.split()) for part in parts)


def run(command: Callable[[], Any]) -> None:
    """Call an application; a ConfigError prints one line and gives exit code 2."""
    try:
        command()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
