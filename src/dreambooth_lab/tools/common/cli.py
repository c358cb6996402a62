"""What the command-line tools share: spellings, errors, exit codes.

Options may be written with dashes or underscores. A tool ends with 0 when all went well, 1 when something was not found or is not
whole, 2 when it was asked wrongly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from ...config import ConfigError


def app(**options: Any) -> typer.Typer:
    """An application of one command or several."""
    spelling = {"token_normalize_func": lambda word: word.replace("_", "-")}
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=spelling, **options)


def text(doc: str | None) -> str:
    """A module's docstring as a command's help: paragraphs that are indented keep their lines."""
    parts = (doc or "").split("\n\n")
    return "\n\n".join(f"\b\n{part}" if part.startswith(" ") else " ".join(part.split()) for part in parts)


def run(command: Callable[[], Any]) -> None:
    """Call an application; what can't be done is one line and exit code 2."""
    try:
        command()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
