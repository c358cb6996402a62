"""Output: tables with boxes and progress bars in a terminal, plain lines in a log file, at any width and encoding."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TextIO, TypeVar

from rich import progress
from rich.console import Console
from rich.table import Table

log = logging.getLogger(__name__)

FILE_WIDTH = 120  # characters of a line in a file
EVERY = 60.0  # seconds between two lines of progress in a log
Item = TypeVar("Item")


def console(file: TextIO | None = None) -> Console:
    """The width of the terminal; `FILE_WIDTH` for a file or pipe."""
    made = Console(file=file)
    return made if made.is_terminal else Console(file=file, width=FILE_WIDTH)


def show(*tables: Table, on: Console | None = None) -> None:
    """Print the tables that have rows; without boxes if the output is not a terminal."""
    target = on or console()
    for table in tables:
        if not table.row_count:
            continue
        box = table.box
        if not target.is_terminal:
            table.box = None
        target.print(table, *([] if target.is_terminal else [""]), sep="\n")
        table.box = box


def table(title: str, *columns: str, wraps: tuple[str, ...]) -> Table:
    """An empty table; columns that don't wrap are never cut."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold", no_wrap=column not in wraps)
    return made


def track(items: Iterable[Item], what: str, hidden: bool = False) -> Iterator[Item]:
    """Iterate over the items with a progress bar in a terminal, else with one line per minute and one at the end."""
    target = console()
    if hidden or target.is_terminal:
        yield from progress.track(items, what, console=target, disable=hidden)
        return
    total, shown = f" of {len(items)}" if isinstance(items, Sized) else "", time.monotonic()
    number = 0
    for number, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown >= EVERY:
            log.info("%s: %d%s", what, number, total)
            shown = time.monotonic()
    if number:
        log.info("%s: %d done", what, number)


def span(seconds: float) -> str:
    """A readable duration: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
