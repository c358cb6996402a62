"""Hashes of files, cached by (path, size, modification time), so that a start need not read unchanged gigabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

LENGTH = 64  # hexadecimal digits of a SHA-256


def digest(file: Path, cache: Path | None) -> str:
    """SHA-256 of a file.

    Args:
        cache: its folder `digests` stores the hashes; None: the file is read every time.
    """
    note = cache / "digests" / _state(file) if cache else None
    if note and note.is_file() and len(stored := note.read_text()) == LENGTH:
        return stored
    with file.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    if note:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(value)
    return value


def _state(file: Path) -> str:
    """A key that changes with the file; a link is replaced by its target."""
    file = file.resolve()
    state = file.stat()
    return hashlib.sha256(f"{file} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
