"""Keys of cache entries: the hash of everything that a value depends on."""

from __future__ import annotations

import hashlib

VERSION = "2"  # of the format; part of every key


def key(*parts: str) -> str:
    """SHA-256 over parts, in hexadecimal; different lists of parts never have the same bytes."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in (VERSION, *parts)).encode()).hexdigest()
