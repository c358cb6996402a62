"""The preflight's memory estimate against the true peak of a training step:

    python -m dreambooth_lab.tools.measure_memory model.pretrained=… dataset.path=… dataset.batch_size=4 …

The words are those of a training run. The peak is that of torch's allocator on a GPU; on a CPU, of the sizes that its profiler
records, so the interpreter and the libraries are left out on both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import inf

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from .. import draw, lab, memory
from ..batch import Batch
from ..config import ConfigError, anchor, check
from ..data.module import DreamBoothData
from ..draw import Purpose
from ..dreambooth import DreamBooth
from ..run import build_adapter, build_family


def main(words: list[str]) -> None:
    cfg = anchor(lab.compose(*words))
    check(cfg)
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    adapter.attach(family.denoiser, family.learns, draw.torch_seed(cfg.seed, 0, Purpose.ADAPTER_INIT))
    module = DreamBooth(cfg, family, adapter).train()
    largest = max((bucket.shape for bucket in data.schedule.buckets), key=lambda shape: shape[0] * shape[1])
    parts = memory.estimate(module, data.text(""), largest, cfg.dataset.batch_size, False)
    optimizer = module.configure_optimizers()["optimizer"]
    batch = next(b for b in map(_batch(data), range(10**6)) if b.mean.shape[2] * family.factor == largest[0])

    def step() -> None:
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimiser's moments are there from now on
    there = list(module.denoiser.parameters()) + [s for state in optimizer.state.values() for s in state.values()]
    resident = sum(t.numel() * t.element_size() for t in there if isinstance(t, torch.Tensor))
    true = resident + memory.peak(step, family.device)
    table = Table("for", "MiB", title=f"{cfg.model.pretrained.split('/')[-1]}, batch {cfg.dataset.batch_size}, {largest}")
    for what, size in [*parts.items(), ("together", sum(parts.values())), ("true peak", true)]:
        table.add_row(what, f"{size / 2**20:,.1f}")
    table.add_row("estimate / true peak", f"{sum(parts.values()) / (true or inf):.2f}")
    Console(width=100).print(table)


def _batch(data: DreamBoothData) -> Callable[[int], Batch]:
    return lambda number: data.build(data.schedule.batch(number))


if __name__ == "__main__":
    OmegaConf.register_new_resolver("run_folder", lambda *_: "", replace=True)
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
