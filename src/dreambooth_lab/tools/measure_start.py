"""What quantised weights on disk save a start: `python -m dreambooth_lab.tools.measure_start quant=int8 [key=value …]`.

Loads the denoiser in fresh processes: in full precision, quantised with an empty cache, and quantised from the cache that this
filled. Prints a Markdown table of seconds until it is there, libraries already imported, and of the process's peak memory
above what it held before. The words configure the model, as for a run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from subprocess import run as run_process
from typing import NamedTuple

HELD = "/proc/self/status"


class Start(NamedTuple):
    """One start's cost."""

    seconds: float
    peak: float  # MiB above what was held before
    cached: bool | None  # whether quantised weights came from the cache; None: none are asked for


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path(HELD).read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def load(words: list[str]) -> Start:
    """Load the denoiser in this process."""
    from ..lab import compose
    from ..quant import backend
    from ..run import build_family

    cfg = compose("dataset.path=.", *words)
    if cfg.quant.kind.value != "none":
        backend(cfg.quant.kind)
    family, before = build_family(cfg), memory("VmRSS")
    start = time.perf_counter()
    assert family.denoiser is not None
    done = family.quantiser.done.get(family.denoiser_part)
    return Start(time.perf_counter() - start, memory("VmHWM") - before, done.cached if done else None)


def in_a_fresh_process(words: list[str]) -> Start:
    code = f"import json; from dreambooth_lab.tools.measure_start import load; print(json.dumps(load({words!r})))"
    done = run_process([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return Start(*json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        words = [*sys.argv[1:], f"cache={cache}"]
        plain = [*(word for word in words if not word.startswith("quant=")), "quant=none"]
        names = {"full precision": plain, "first, quantising": words, "second, cached": words}
        starts = {name: in_a_fresh_process(asked) for name, asked in names.items()}
    first, second = (starts[name] for name in ("first, quantising", "second, cached"))
    if (first.cached, second.cached) != (False, True):
        sys.exit("error: nothing was quantised; say quant=int8, or another kind")
    print("| start | seconds | peak, MiB |\n|---|---|---|")
    for name, start in starts.items():
        print(f"| {name} | {start.seconds:.1f} | {start.peak:,.0f} |")
    print(f"| second / first | {second.seconds / first.seconds:.2f} | {second.peak / first.peak:.2f} |")


if __name__ == "__main__":
    main()
