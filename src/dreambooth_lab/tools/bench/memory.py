"""The preflight's two memory estimates, the one of its tables and the forecast made without weights, against the true peak of a
training step:

    python -m dreambooth_lab.tools.bench.memory model.pretrained=… dataset.path=… dataset.batch_size=4 …

The words are those of a training run. The peak is that of torch's allocator on a GPU; on a CPU, of the sizes that its profiler
records, so the interpreter and the libraries are left out on both.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

from lightning.fabric.utilities import move_data_to_device
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ...batch import Batch
from ...dreambooth import DreamBooth
from ...forecast.cached_counts import CachedCounts
from ...forecast.phases import Forecast
from ...profiling import memory
from ..common.training import build_training
from ..common.training_config import command, compose_checked


def true_peak(module: DreamBooth, batch: Batch) -> int:
    """Bytes on the device at the worst moment of a training step."""
    optimizer = module.configure_optimizers()["optimizer"]

    def step() -> None:
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the optimiser's moments are there from now on
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return memory.stored([*module.parameters(), *moments]) + memory.peak(step, module.family.device)


def main(words: list[str]) -> None:
    module, data = build_training(compose_checked(words))
    rows, pretrained, factor = module.cfg.dataset.batch_size, Path(module.cfg.model.pretrained).name, module.family.factor
    largest = max((bucket.shape for bucket in data.schedule.buckets), key=lambda shape: shape[0] * shape[1])
    parts = memory.estimate(module, data.text(""), largest, rows, False)
    batches = (data.build(data.schedule.batch(number)) for number in count())
    batch = next(b for b in batches if (b.mean.shape[2] * factor, b.mean.shape[3] * factor) == largest)
    true, together = true_peak(module, move_data_to_device(batch, module.family.device)), sum(parts.values())
    table = Table("for", "MiB", title=f"{pretrained}, batch {rows}, {largest[1]} × {largest[0]} px")
    for what, size in [*parts.items(), ("together", together), ("true peak", true)]:
        table.add_row(what, f"{size / 2**20:,.1f}")
    table.add_row("estimate / true peak", f"{together / true:.2f}")
    forecast = next(
        need
        for need in Forecast(module.cfg, CachedCounts(Path(module.cfg.cache) / "fitting")).phases()
        if need.phase == "training"
    )
    table.add_row("forecast / true peak", f"{forecast.total / true:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    command(main, __doc__)
