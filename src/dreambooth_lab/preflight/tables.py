"""The tables of the preflight."""

from __future__ import annotations

import psutil
import torch
from omegaconf import DictConfig
from rich.table import Table

from ..config import enums, processes, rows_per_step
from ..data.module import DreamBoothData, Summary
from ..dreambooth import DreamBooth
from ..optimizer import learning_rate
from ..profiling import memory
from ..quant import Quantised
from ..terminal import table


def datasets(data: DreamBoothData) -> Table:
    columns = ("dataset", "use", "images", "rejected", "masks", "buckets")
    made = table("Datasets", *columns, wraps=("dataset",))
    for s in data.summaries():
        use = "eval" if s.spec.is_eval else "class" if s.spec.is_class else "instance"
        made.add_row(s.spec.id, use, *map(str, (s.found, len(s.rejected), s.masks, s.buckets)))
    return made


def mixture(data: DreamBoothData) -> Table:
    made = table("Mixture and caches", "dataset", "rows/epoch", "share", "cached", "encoded", wraps=("dataset",))
    rows = data.rows_per_epoch()
    total = sum(rows.values())
    for s in data.summaries():
        mine = rows[s.spec.id]
        made.add_row(s.spec.id, f"{mine:.1f}", f"{mine / total:.0%}", str(s.cached), str(s.built))
    return made


def crops(data: DreamBoothData) -> Table:
    made = table("Area removed by crops, share of each image", "dataset", "mean", "worst", wraps=("dataset",))
    for of, lost in data.croppings().items():
        made.add_row(of, f"{lost.mean:.1%}", f"{lost.worst:.1%}")
    return made


def much_cut(data: DreamBoothData) -> Table:
    made = table("Images that lose more than a third", "dataset", "image", "removed", wraps=("dataset", "image"))
    for of, lost in data.croppings().items():
        for name, share in lost.much:
            made.add_row(of, name, f"{share:.1%}")
    return made


def notices(data: DreamBoothData) -> Table:
    column = "notices"
    made = table("Notices", column, wraps=(column,))
    for notice in data.notices:
        made.add_row(notice)
    return made


def rejected(summaries: list[Summary]) -> Table:
    made = table("Rejected images", "dataset", "image", "rule", wraps=("dataset", "image", "rule"))
    for summary in summaries:
        for item in summary.rejected:
            made.add_row(summary.spec.id, item.name, item.reason)
    return made


def buckets(data: DreamBoothData) -> Table:
    made = table("Buckets: images of each shape", "width × height", "instance", "class", "rows/epoch", wraps=())
    for bucket in data.schedule.buckets:
        height, width = bucket.shape
        rows = sum(group.rows for group in bucket.groups)
        cells = (len(bucket.instances), len(bucket.classes), f"{rows:.1f}")
        made.add_row(f"{width} × {height}", *map(str, cells))
    return made


def training(cfg: DictConfig, data: DreamBoothData, module: DreamBooth, layers: list[str]) -> Table:
    made = table("Training", "what", "value", wraps=("value",))
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    base = module.family.quantiser.done.get(module.family.denoiser_part)
    whole = base.parameters if base else sum(p.numel() for p in module.denoiser.parameters())
    steps = data.schedule.batches_per_epoch / cfg.trainer.accumulate_grad_batches
    rows = {
        "base model": cfg.model.pretrained,
        "adapted layers": f"{len(layers):,}",
        "trainable parameters": f"{trainable:,} of {whole:,}",
        "optimiser steps": f"{cfg.trainer.max_steps:,} ({cfg.trainer.max_steps / steps:.1f} epochs of {steps:.1f} steps)",
        "rows per optimiser step": str(rows_per_step(cfg)),
        "learning rate": _rate(cfg),
        "prior": _prior(cfg, data),
        "rollout": _rollout(cfg),
        **{f"{part} in {done.kind.value}": _quantised(done) for part, done in module.family.quantiser.done.items()},
        "device": str(module.family.device) + (f" and {more} more" if (more := processes(cfg) - 1) else ""),
        "images read": f"{data.scanned} (the others are unchanged since the last scan)",
        "damaged cache entries rebuilt": str(data.damaged),
    }
    for what, value in rows.items():
        made.add_row(what, value)
    return made


def _rate(cfg: DictConfig) -> str:
    optimizer, steps = cfg.optimizer, cfg.trainer.max_steps
    length = optimizer.schedule_steps or steps
    warm = f", after {optimizer.warmup_steps:,} steps of warm-up" if optimizer.warmup_steps else ""
    if optimizer.schedule is enums.Schedule.constant:
        return f"{optimizer.lr:g}, constant{warm}"
    last = optimizer.lr * learning_rate(optimizer.schedule, optimizer.warmup_steps, length, optimizer.cycles)(length - 1)
    held = f", then {last:.3g} to the end" if steps > length else ""
    return f"{optimizer.lr:g}, {optimizer.schedule.name} over {length:,} steps{warm}{held}"


def _prior(cfg: DictConfig, data: DreamBoothData) -> str:
    prior = cfg.prior
    if prior.kind is enums.PriorKind.none:
        return "none"
    if not prior.kind.has_class_rows:
        return f"{prior.kind.name}, weight {prior.weight:g}"
    bank = f", {prior.bank.draws} draws per image, {data.bank.built} computed now" if data.bank else ""
    return f"{prior.kind.name}, weight {prior.weight:g}, class images: {prior.source.name}{bank}"


def _rollout(cfg: DictConfig) -> str:
    rollout = cfg.rollout
    if not rollout.enabled:
        return "off"
    share = f"of {rollout.probability:.0%} of the rows, rising over {rollout.ramp_steps:,} steps"
    if rollout.kind is enums.RolloutKind.input_perturbation:
        return f"input perturbation {rollout.perturbation:g} {share}"
    return f"1 to {rollout.max_step_offset} sampler steps of 1/{rollout.num_steps} ({rollout.sampler.name}) {share}"


def _quantised(done: Quantised) -> str:
    return (
        f"{done.layers} layers, {done.weights_size / done.weights:.2f} bytes per weight; whole model "
        f"{done.size / 2**20:,.1f} MiB, {done.size / done.parameters:.2f} bytes per parameter; "
        f"{'loaded from the cache' if done.cached else 'quantised'} in {done.seconds:.1f} s; "
        f"{len(done.left)} layers skipped: {', '.join(_tails(done.left)) or 'none'}"
    )


def _tails(names: tuple[str, ...]) -> list[str]:
    """Last components of layer names, each once."""
    return sorted({name.rpartition(".")[2] for name in names})


def device_memory(cfg: DictConfig, data: DreamBoothData, module: DreamBooth) -> Table:
    made = table("Device memory, estimated", "for", "MiB", wraps=("for",))
    largest = max((bucket.shape for bucket in data.schedule.buckets), key=lambda shape: shape[0] * shape[1])
    average = bool(cfg.ema.enabled and cfg.ema.device != "cpu")
    parts = memory.estimate(module, data.text(""), largest, cfg.dataset.batch_size, average)
    for what, size in parts.items():
        made.add_row(what, f"{size / 2**20:,.0f}")
    needs, has = sum(parts.values()), _has(module.family.device)
    made.add_row("together", f"{needs / 2**20:,.0f}")
    made.add_row("available on the device", f"{has / 2**20:,.0f}")
    made.add_row("fits", "yes" if needs <= has else "no")
    return made


def _has(device: torch.device) -> int:
    """Bytes of a GPU; on the CPU, free memory and that of this process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
