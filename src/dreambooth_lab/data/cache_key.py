"""Keys of cache entries: the hash of all that a value depends on."""

from __future__ import annotations

import hashlib

VERSION = "2"  # of what is stored; part of every key


def key(*parts: str) -> str:
    """SHA-256 over parts, in hexadecimal; no two different lists of parts share their bytes."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in (VERSION, *parts)).encode()).hexdigest()
