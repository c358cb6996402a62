"""`python -m dreambooth_lab.tools.cache stats|verify|prune [FOLDER …]`: list, verify and prune caches.

A folder is a cache root (`cache=` of a run; `.cache` if none is given) or a folder named by cache_dir_vae or cache_dir.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..config import ConfigError
from ..data.caching.cache import KINDS, Damaged, Store, current_day
from .common import cli

LEFT_OVER = 3600  # seconds after which a partial file has no writer any more


application = cli.app(help=__doc__)
Folders = Annotated[list[Path] | None, typer.Argument(help="caches; .cache if none is given")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="list what would be removed, and remove nothing")]


@application.command("stats")
def _stats(folders: Folders = None) -> None:
    """Entries, sizes and ages."""
    stats(stores(folders))


@application.command("verify")
def _verify(folders: Folders = None, dry_run: DryRun = False) -> None:
    """Read every entry and remove damaged ones; exits with 1 if there were any."""
    if verify(stores(folders), dry_run):
        raise typer.Exit(1)


@application.command("prune")
def _prune(
    folders: Folders = None,
    unused_days: Annotated[int | None, typer.Option(min=0, help="remove entries that no run has used for this many days")] = None,
    max_gb: Annotated[
        float | None,
        typer.Option(min=0, help="remove the least recently used entries until each folder has at most this many GB"),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Remove entries that were not used recently."""
    if unused_days is None and max_gb is None:
        raise ConfigError("prune has no criterion; give --unused-days N, --max-gb N, or both")
    prune(stores(folders), unused_days, max_gb, dry_run)


def stores(folders: list[Path] | None) -> list[Store]:
    """The contents of cache folders.

    Raises:
        ConfigError: one is not a folder.
    """
    named = [folder.expanduser() for folder in folders or [Path(".cache")]]
    if absent := [str(folder) for folder in named if not folder.is_dir()]:
        raise ConfigError(f"{', '.join(absent)}: no such folder; give a cache folder")
    return [Store(folder, kind) for folder in named for kind in KINDS if (folder / kind).is_dir()]


def main(words: list[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: application(words))


def _size(store: Store, key: str) -> int:
    return store.path(key).stat().st_size


def _left_over(store: Store) -> list[Path]:
    """Partial files of processes that no longer exist."""
    parts = [*store.folder.glob("??/*.part"), *store.folder.glob("*.part")]
    return [path for path in parts if time.time() - path.stat().st_mtime > LEFT_OVER]


def stats(stores: list[Store]) -> None:
    """Print entries, sizes and ages by folder."""
    table = Table("folder", "entries", "MB", "unused for 30 days", "partial files")
    for store in stores:
        keys = list(store.keys())
        size = sum(_size(store, key) for key in keys) / 1e6
        old = sum(current_day() - store.last_used(key) >= 30 for key in keys)
        table.add_row(str(store.folder), f"{len(keys):,}", f"{size:,.1f}", f"{old:,}", str(len(_left_over(store))))
    Console().print(table)


def verify(stores: list[Store], dry_run: bool) -> bool:
    """Read every entry; damaged ones are removed, and rebuilt by the next run that needs them. Returns whether there were any."""
    total = damaged = 0
    for store in stores:
        for key in track(list(store.keys()), str(store.folder)):
            total += 1
            try:
                store.check(key)
            except Damaged as error:
                damaged += 1
                print(f"damaged: {error}")
                if not dry_run:
                    store.drop(key)
    print(f"{total} entries read, {damaged} damaged" + (", removed" if damaged and not dry_run else ""))
    return damaged > 0


def prune(stores: list[Store], unused_days: int | None, max_gb: float | None, dry_run: bool) -> None:
    """Remove the least recently used entries, and partial files."""
    count = freed = 0
    for store in stores:
        for key in _to_go(store, unused_days, max_gb):
            count, freed = count + 1, freed + _size(store, key)
            if not dry_run:
                store.remove(key)
        for path in _left_over(store):
            count, freed = count + 1, freed + path.stat().st_size
            if not dry_run:
                path.unlink(missing_ok=True)
    print(f"{'would remove' if dry_run else 'removed'} {count} files, {freed / 1e6:,.1f} MB")


def _to_go(store: Store, unused_days: int | None, max_gb: float | None) -> Iterator[str]:
    keys = sorted(store.keys(), key=store.last_used)
    left = sum(_size(store, key) for key in keys)
    for key in keys:
        old = unused_days is not None and current_day() - store.last_used(key) >= unused_days
        if old or (max_gb is not None and left > max_gb * 1e9):
            left -= _size(store, key)
            yield key


if __name__ == "__main__":
    main()
