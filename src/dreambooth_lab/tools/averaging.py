"""The work of `tools.average`: exports and eval losses of averages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from .. import lab, rebuilt
from ..callbacks.eval_loss import EvalRow, evaluate
from ..callbacks.export import Export
from ..callbacks.scores import interval
from ..data.eval_batches import EvalBatch, eval_batches
from ..data.module import DreamBoothData
from ..dreambooth import DreamBooth
from ..factory import build_family
from .average import Compared

LIVE = "live, last step"


def write(run: lab.Run, lengths: Sequence[float], step: int | None, output: Path) -> list[Compared]:
    """Export the average of each length to a folder in `output`; returns their eval losses, the live weights' first.

    Raises:
        ConfigError: the run has no such snapshots, or a length is out of range.
    """
    end, weights = rebuilt.averages(run.folder, lengths, step)
    batches, made = held_out_batches(run), run.module("last")
    losses = {LIVE: measured(made, batches, end)} if batches else {}
    for length, average in zip(lengths, weights, strict=True):
        rebuilt.put(made, average)
        name = f"average_{length:g}"
        why = f"The average of length {length:g} (σ_rel) that ends at step {end}."
        Export(run.config, run.folder, None, {}).write(made, end, output / name, why)
        print(output / name)
        if batches:
            losses[name] = measured(made, batches, end)
    return [_compared(name, rows, losses[LIVE]) for name, rows in losses.items()]


def held_out_batches(run: lab.Run) -> list[EvalBatch]:
    """The run's eval batches; its caches are filled first."""
    cfg = rebuilt.here(run.config)
    data = DreamBoothData(cfg, build_family(cfg))
    data.prepare()
    return eval_batches(data, cfg.eval.timesteps, cfg.dataset.batch_size)


def measured(module: DreamBooth, batches: Sequence[EvalBatch], step: int) -> list[EvalRow]:
    return [row for batch in batches for row in evaluate(batch, step, module)]


def _compared(name: str, rows: Sequence[EvalRow], live: Sequence[EvalRow]) -> Compared:
    changes: dict[str, list[float]] = defaultdict(list)
    for own, before in zip(rows, live, strict=True):
        changes[own.image].append(own.loss - before.loss)
    of_images = [fmean(values) for values in changes.values()]
    known = interval(of_images) if name != LIVE else (float("nan"), float("nan"))
    return Compared(name, fmean(row.loss for row in rows), fmean(of_images), known)
