"""Freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def trim() -> None:
    """Give back what the C library keeps for reuse, such as the room of a model that was read and replaced; glibc's only."""
    gc.collect()
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)
