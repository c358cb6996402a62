"""What quantised weights on disk save a start: `python -m dreambooth_lab.tools.bench.load_time quant=int8 [key=value …]`.

Loads the denoiser in fresh processes: in full precision, quantised with an empty cache, and quantised from the cache that this
filled. Prints a Markdown table of seconds until it is there, libraries already imported, and of the process's peak memory
above what it held before. The words configure the model, as for a run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from subprocess import run as run_process
from typing import NamedTuple

import psutil

from ... import heap
from ...config import ConfigError
from ..common.training_config import command

MIB = 2**20


class Start(NamedTuple):
    """One start's cost."""

    seconds: float
    peak: float  # MiB above what was held before
    cached: bool | None  # whether quantised weights came from the cache; None: none are asked for


def load(words: list[str]) -> Start:
    """Load the denoiser in this process."""
    from ...factory import build_family
    from ...lab import compose
    from ...quant import backend

    cfg = compose("dataset.path=.", *words)
    if cfg.quant.kind.value != "none":
        backend(cfg.quant.kind)
    family, before = build_family(cfg), psutil.Process().memory_info().rss
    start = time.perf_counter()
    assert family.denoiser is not None
    done = family.quantiser.done.get(family.denoiser_part)
    return Start(time.perf_counter() - start, (heap.peak() - before) / MIB, done.cached if done else None)


def in_a_fresh_process(words: list[str]) -> Start:
    code = f"import json; from dreambooth_lab.tools.bench.load_time import load; print(json.dumps(load({words!r})))"
    done = run_process([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Start(*json.loads(done.stdout.splitlines()[-1]))


def main(asked: list[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        words = [*asked, f"cache={cache}"]
        plain = [*(word for word in words if not word.startswith("quant=")), "quant=none"]
        names = {"full precision": plain, "first, quantising": words, "second, cached": words}
        starts = {name: in_a_fresh_process(own) for name, own in names.items()}
    first, second = (starts[name] for name in ("first, quantising", "second, cached"))
    if (first.cached, second.cached) != (False, True):
        raise ConfigError("quant is none, so nothing was quantised; say quant=int8, or another kind")
    print("| start | seconds | peak, MiB |\n|---|---|---|")
    for name, start in starts.items():
        print(f"| {name} | {start.seconds:.1f} | {start.peak:,.0f} |")
    print(f"| second / first | {second.seconds / first.seconds:.2f} | {second.peak / first.peak:.2f} |")


if __name__ == "__main__":
    command(main, __doc__)
