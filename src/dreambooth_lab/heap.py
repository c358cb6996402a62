"""Python's collector and the C library's heap."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")  # Linux: this process alone, where getrusage begins with what its parent held


def trim(collect: bool = True) -> None:
    """Give back what the C library keeps for reuse, such as the room of a model that was read and replaced; glibc's only.

    Args:
        collect: first what waits for Python's collector, a tenth of a second's work.
    """
    if collect:
        gc.collect()
    if sys.platform == "linux" and (give_back := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        give_back(0)


@contextmanager
def imports() -> Iterator[None]:
    """Import without collecting meanwhile, and leave what the modules made out of later collections.

    Torch, diffusers and transformers make a million objects that live as long as the process; looking at them again and again
    costs a start a second.
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
