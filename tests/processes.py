"""Forked child processes, to save the start of an interpreter."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Fork a child that calls `work` and exits; returns its id. An alarm ends a child that hangs."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(120)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """Wait for a child; returns its exit status, or the negative signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
