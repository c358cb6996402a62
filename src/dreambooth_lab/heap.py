"""Python's garbage collector and the C library's heap."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")  # Linux: this process only; getrusage starts with the parent's peak


def trim(collect: bool = True) -> None:
    """Return freed memory that the C library holds for reuse to the system, for example of a replaced model; glibc only.

    Args:
        collect: run Python's garbage collector first, which takes a tenth of a second.
    """
    if collect:
        gc.collect()
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


@contextmanager
def imports() -> Iterator[None]:
    """Import without garbage collection, and exclude the modules' objects from later collections.

    Torch, diffusers and transformers create a million objects that live as long as the process; scanning them repeatedly
    delays a start by a second.
    """
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if len(sys.modules) > before:
            gc.freeze()


def peak() -> int:
    """Most bytes that this process has held in memory so far."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    held = psutil.Process().memory_info()
    if hasattr(held, "peak_wset"):  # Windows
        return int(held.peak_wset)
    import resource  # Unix

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
