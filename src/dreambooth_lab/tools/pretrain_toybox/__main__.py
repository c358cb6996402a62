"""`python -m dreambooth_lab.tools.pretrain_toybox stage=all`, or one of `ORDER`.

Each stage adds a line to `out`/times.jsonl when it ends, finished or interrupted: its wall seconds, CPU seconds (its workers'
too) and peak memory. About two and a half hours on two cores that have nothing else to do; `OMP_WAIT_POLICY=passive` makes the
UNet's steps 1.4 times as long then, and is right only beside other work.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import hydra
import psutil
from omegaconf import DictConfig

from dreambooth_lab import heap
from dreambooth_lab.config import ConfigError, conf_dir

ORDER = ("vae", "polish", "latents", "evaluator", "unet", "scorer", "dino", "export", "judge", "pictures")


def cpu_seconds() -> float:
    """Of this process and its finished workers; on Windows without these."""
    spent = psutil.Process().cpu_times()
    return spent.user + spent.system + spent.children_user + spent.children_system


@contextmanager
def timed(stage: str, out: Path) -> Iterator[None]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    try:
        yield
    finally:
        peak = heap.peak() // 2**20  # of the process so far
        line = {"stage": stage, "wall_s": round(time.perf_counter() - wall), "cpu_s": round(cpu_seconds() - cpu), "peak_mb": peak}
        out.mkdir(parents=True, exist_ok=True)
        with (out / "times.jsonl").open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="pretrain_toybox")
def main(cfg: DictConfig) -> None:
    import torch

    torch.set_flush_denormal(True)
    torch.set_num_threads(cfg.threads)
    if cfg.stage not in (*ORDER, "all"):
        sys.exit(f"error: stage is {cfg.stage!r}; it must be all, or one of {', '.join(ORDER)}")
    try:
        for stage in ORDER if cfg.stage == "all" else (cfg.stage,):
            with timed(stage, Path(cfg.out)):
                import_module(f"dreambooth_lab.tools.pretrain_toybox.{stage}").run(cfg)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
