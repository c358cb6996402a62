"""Hashes of files, remembered by (path, size, time of change), so that a start need not read gigabytes that have not changed."""

from __future__ import annotations

import hashlib
from pathlib import Path

LENGTH = 64  # hexadecimal digits of a SHA-256


def digest(file: Path, cache: Path | None) -> str:
    """SHA-256 of a file.

    Args:
        cache: its folder `digests` remembers; None: the file is read every time.
    """
    note = cache / "digests" / _state(file) if cache else None
    if note and note.is_file() and len(said := note.read_text()) == LENGTH:
        return said
    with file.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    if note:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(value)
    return value


def _state(file: Path) -> str:
    """What changes when a file does; a link is the file that it leads to."""
    file = file.resolve()
    state = file.stat()
    return hashlib.sha256(f"{file} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
