"""The tables shown, and saved with the run, before anything is trained."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from . import memory
from .config import PriorKind, RolloutKind
from .data.module import DreamBoothData, Summary
from .dreambooth import DreamBooth
from .quant import Quantised


def show(cfg: DictConfig, data: DreamBoothData, module: DreamBooth, layers: list[str], path: Path) -> None:
    """Print what is about to run, and write the same to `path`."""
    tables = [
        _datasets(data), _mixture(data), _rejected(data.summaries()), _notices(data), _buckets(data),
        _training(cfg, data, module, layers), _memory(cfg, data, module),
    ]  # fmt: skip
    with path.open("w", encoding="utf-8") as file:
        for console in (Console(), Console(file=file, width=120)):
            for table in tables:
                if table.row_count:
                    console.print(table)


def _table(title: str, *columns: str, wraps: tuple[str, ...]) -> Table:
    """An empty table; columns that don't wrap are shown whole in any terminal."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in wraps)
    return table


def _datasets(data: DreamBoothData) -> Table:
    columns = ("dataset", "use", "pictures", "rejected", "masks", "buckets")
    table = _table("Datasets", *columns, wraps=("dataset",))
    for s in data.summaries():
        use = "eval" if s.spec.is_eval else "class" if s.spec.is_class else "instance"
        table.add_row(s.spec.id, use, *map(str, (s.found, len(s.rejected), s.masks, s.buckets)))
    return table


def _mixture(data: DreamBoothData) -> Table:
    table = _table("Mixture and caches", "dataset", "rows/epoch", "share", "cached", "encoded", wraps=("dataset",))
    rows = data.rows_per_epoch()
    total = sum(rows.values())
    for s in data.summaries():
        mine = rows[s.spec.id]
        table.add_row(s.spec.id, f"{mine:.1f}", f"{mine / total:.0%}", str(s.cached), str(s.built))
    return table


def _notices(data: DreamBoothData) -> Table:
    column = "what was said but changes nothing here"
    table = _table("Notices", column, wraps=(column,))
    for notice in data.notices:
        table.add_row(notice)
    return table


def _rejected(summaries: list[Summary]) -> Table:
    table = _table("Rejected pictures", "dataset", "picture", "rule", wraps=("dataset", "picture", "rule"))
    for summary in summaries:
        for item in summary.rejected:
            table.add_row(summary.spec.id, item.name, item.reason)
    return table


def _buckets(data: DreamBoothData) -> Table:
    table = _table("Buckets", "width × height", "instance pictures", "class pictures", "rows/epoch", wraps=())
    for bucket in data.schedule.buckets:
        height, width = bucket.shape
        rows = sum(group.rows for group in bucket.groups)
        cells = (len(bucket.instances), len(bucket.classes), f"{rows:.1f}")
        table.add_row(f"{width} × {height}", *map(str, cells))
    return table


def _training(cfg: DictConfig, data: DreamBoothData, module: DreamBooth, layers: list[str]) -> Table:
    table = _table("Training", "what", "value", wraps=("value",))
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    base = module.family.quantiser.done.get(module.family.denoiser_part)
    whole = base.parameters if base else sum(p.numel() for p in module.denoiser.parameters())
    steps = data.schedule.batches_per_epoch / cfg.trainer.accumulate_grad_batches
    rows = {
        "base model": cfg.model.pretrained,
        "adapted layers": f"{len(layers):,}",
        "trainable parameters": f"{trainable:,} of {whole:,}",
        "optimiser steps": f"{cfg.trainer.max_steps:,} ({cfg.trainer.max_steps / steps:.1f} epochs of {steps:.1f} steps)",
        "rows per optimiser step": str(cfg.dataset.batch_size * cfg.trainer.accumulate_grad_batches * cfg.trainer.devices),
        "prior": _prior(cfg, data),
        "rollout": _rollout(cfg),
        **{f"{part} in {done.kind.value}": _quantised(done) for part, done in module.family.quantiser.done.items()},
        "device": str(module.family.device) + (f" and {more} more" if (more := cfg.trainer.devices - 1) else ""),
        "pictures read": f"{data.scanned} (the others are as the last scan found them)",
        "damaged cache entries made again": str(data.damaged),
    }
    for what, value in rows.items():
        table.add_row(what, value)
    return table


def _prior(cfg: DictConfig, data: DreamBoothData) -> str:
    prior = cfg.prior
    if prior.kind is PriorKind.none:
        return "none"
    bank = f", {prior.bank.draws} draws a picture, {data.bank.built} made now" if data.bank else ""
    return f"{prior.kind.name}, weight {prior.weight:g}, class pictures: {prior.source.name}{bank}"


def _rollout(cfg: DictConfig) -> str:
    rollout = cfg.rollout
    if not rollout.enabled:
        return "off"
    share = f"of {rollout.probability:.0%} of the rows, rising over {rollout.ramp_steps:,} steps"
    if rollout.kind is RolloutKind.input_perturbation:
        return f"input perturbation {rollout.perturbation:g} {share}"
    return f"1 to {rollout.max_step_offset} strides of 1/{rollout.grid} ({rollout.sampler.name}) {share}"


def _quantised(done: Quantised) -> str:
    return (
        f"{done.layers} layers, {done.weights_size / done.weights:.2f} bytes a weight; whole {done.size / 2**20:,.1f} MiB, "
        f"{done.size / done.parameters:.2f} bytes a parameter; {'from the cache' if done.cached else 'made'} in "
        f"{done.seconds:.1f} s; {len(done.left)} left alone: {', '.join(_tails(done.left)) or 'none'}"
    )


def _tails(names: tuple[str, ...]) -> list[str]:
    """Last components of layer names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


def _memory(cfg: DictConfig, data: DreamBoothData, module: DreamBooth) -> Table:
    table = _table("Memory of the device, estimated", "for", "MiB", wraps=("for",))
    largest = max((bucket.shape for bucket in data.schedule.buckets), key=lambda shape: shape[0] * shape[1])
    average = bool(cfg.ema.enabled and cfg.ema.device != "cpu")
    parts = memory.estimate(module, data.text(""), largest, cfg.dataset.batch_size, average)
    for what, size in parts.items():
        table.add_row(what, f"{size / 2**20:,.0f}")
    table.add_row("together", f"{sum(parts.values()) / 2**20:,.0f}")
    return table
