"""`python -m dreambooth_lab.tools.cache stats|verify|prune [FOLDER …]`: what caches hold, whether it is whole, and less of it.

A folder is a cache root (`cache=` of a run; `.cache` if none is given) or a folder named by cache_dir_vae or cache_dir.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..data.cache import KINDS, Damaged, Store, today

LEFT_OVER = 3600  # seconds after which a half-written file has no writer any more


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if `verify` found damage, 2 for a folder that is none."""
    parser = argparse.ArgumentParser(prog="python -m dreambooth_lab.tools.cache", description=__doc__)
    parser.add_argument("what", choices=["stats", "verify", "prune"])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path(".cache")])
    parser.add_argument("--unused-days", type=int, help="prune: entries that no run has asked for in so many days")
    parser.add_argument("--max-gb", type=float, help="prune: the longest unused, until so many GB are left in each folder")
    parser.add_argument("--dry-run", action="store_true", help="prune, verify: say what would go, and leave it")
    options = parser.parse_args(words)
    absent = [folder for folder in options.folders if not folder.expanduser().is_dir()]
    if absent:
        print(f"error: {', '.join(map(str, absent))}: no such folder; give a cache folder", file=sys.stderr)
        return 2
    if options.what == "prune" and options.unused_days is None and options.max_gb is None:
        parser.error("prune needs --unused-days N, --max-gb N, or both")
    stores = [Store(folder.expanduser(), kind) for folder in options.folders for kind in KINDS if (folder / kind).is_dir()]
    if options.what == "stats":
        stats(stores)
        return 0
    if options.what == "verify":
        return verify(stores, options.dry_run)
    return prune(stores, options.unused_days, options.max_gb, options.dry_run)


def _size(store: Store, key: str) -> int:
    return store.path(key).stat().st_size


def _left_over(store: Store) -> list[Path]:
    """Half-written files of processes that are gone."""
    parts = [*store.folder.glob("??/*.part"), *store.folder.glob("*.part")]
    return [path for path in parts if time.time() - path.stat().st_mtime > LEFT_OVER]


def stats(stores: list[Store]) -> None:
    """Print entries, sizes and ages by folder."""
    table = Table("folder", "entries", "MB", "unused for 30 days", "left-over parts")
    for store in stores:
        keys = list(store.keys())
        size = sum(_size(store, key) for key in keys) / 1e6
        old = sum(today() - store.last_used(key) >= 30 for key in keys)
        table.add_row(str(store.folder), f"{len(keys):,}", f"{size:,.1f}", f"{old:,}", str(len(_left_over(store))))
    Console().print(table)


def verify(stores: list[Store], dry_run: bool) -> int:
    """Read every entry; damaged ones are removed, to be made again by the next run that needs them."""
    total = damaged = 0
    for store in stores:
        for key in list(store.keys()):
            total += 1
            try:
                store.check(key)
            except Damaged as error:
                damaged += 1
                print(f"damaged: {error}")
                if not dry_run:
                    store.drop(key)
    print(f"{total} entries read, {damaged} damaged" + (", removed" if damaged and not dry_run else ""))
    return 1 if damaged else 0


def prune(stores: list[Store], unused_days: int | None, max_gb: float | None, dry_run: bool) -> int:
    """Remove what was not asked for in a while, longest unused first, and left-over parts."""
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
    return 0


def _to_go(store: Store, unused_days: int | None, max_gb: float | None) -> Iterator[str]:
    keys = sorted(store.keys(), key=store.last_used)
    left = sum(_size(store, key) for key in keys)
    for key in keys:
        old = unused_days is not None and today() - store.last_used(key) >= unused_days
        if old or (max_gb is not None and left > max_gb * 1e9):
            left -= _size(store, key)
            yield key


if __name__ == "__main__":
    sys.exit(main())
