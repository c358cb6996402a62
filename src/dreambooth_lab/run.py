"""One training run: build → preflight → fit → export → report."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from rich.table import Table

from . import heap, preflight, report, sweep, terminal
from .callbacks import builders
from .callbacks.builders import Callbacks, build_callbacks
from .callbacks.checkpoint import AtomicCheckpointIO
from .callbacks.export import export_form
from .compare import race
from .config import ConfigError, RunError, check
from .data.module import DreamBoothData
from .dreambooth import DreamBooth
from .factory import build_family, build_method, device_of, leads
from .library_warnings import silence_libraries
from .models.family import Family
from .optimizer import check_installed as require_optimizer
from .profiling.phases import Phases
from .profiling.speed import step_flops
from .runfolder import STOPPED_COST, RunFolder
from .storage import disk
from .strategy import build_strategy

log = logging.getLogger(__name__)

WAY_OUT = "free disk space, set runs to a folder on another disk, or write less (checkpoint.keep, validation.num_images)"


def run(cfg: DictConfig, root: Path, tables: Sequence[Table] = ()) -> dict[str, float]:
    """Train with a checked config, in the folder `root`; returns the last step's metrics.

    Args:
        tables: already shown, to be saved with the preflight's.

    Raises:
        ConfigError: the files or the machine don't allow the run; nothing has been trained.
        RunError: it can't continue, or was stopped by a signal; all saved files are complete.
    """
    silence_libraries()
    folder = RunFolder(root)
    with folder.locked() if leads() else nullcontext():
        folder.finish_writes()
        return _run(cfg, folder, tables)


def _run(cfg: DictConfig, folder: RunFolder, tables: Sequence[Table]) -> dict[str, float]:
    phases = Phases()
    start = folder.newest_readable() if cfg.resume else None
    require_optimizer(cfg.optimizer)
    family = build_family(cfg)
    with phases("photos, text and caches"):
        data = DreamBoothData(cfg, family)
        data.prepare()
    settle_steps(cfg, data)
    with phases("adapter and preflight"):
        module = build_module(cfg, family, data, folder, tables)
    if cfg.preflight == "only":
        return {}
    with phases("training"):
        lost = build_race(cfg, folder, data) if cfg.race else None
        callbacks = build_callbacks(cfg, folder, data, family, start[1] if start else 0, leads(), lost)
        trainer = build_trainer(cfg, folder, callbacks, phases)
    try:
        with phases("training"):
            fit(trainer, module, data, start[0] if start else None)
    except RunError:  # it was stopped, and can be resumed
        if leads():
            folder.save_cost(phases.cost(), STOPPED_COST)
        raise
    if not trainer.is_global_zero:
        return {}
    folder.save_cost(phases.cost())
    if sweep.recorded(folder):  # its page compares what runs cost
        save_flops(folder, module, data)
    report.write(folder)
    terminal.show(phases.table())
    for line in report.summary_lines(folder):
        log.info(line)
    log.info("done: %s", folder.report)
    return callbacks.metrics.last


def save_flops(folder: RunFolder, module: DreamBooth, data: DreamBoothData) -> None:
    if module.family.shards:
        log.warning("the FLOPs of a step are not counted with trainer.strategy=fsdp: the other processes have ended")
        return
    try:
        folder.save_flops(step_flops(module, data))
    except (RuntimeError, NotImplementedError) as error:  # by a library's own kernel; the run is complete without it
        log.warning("the FLOPs of a step could not be counted: %s", error)


def build_race(cfg: DictConfig, folder: RunFolder, data: DreamBoothData) -> Callable[[int], str | None]:
    """Step → why this job of a sweep has lost to another arm, or None.

    Raises:
        ConfigError: the run has fewer evaluations than it must be behind at.
    """
    evaluations = builders.evaluations(cfg, cfg.eval, data) - 1  # less that of the base model
    if evaluations <= cfg.race:
        problem = f"race is {cfg.race}, but the run has {evaluations} evaluations of the eval loss, its end included"
        raise ConfigError(f"{problem}; lower eval.every_n_steps or race")
    return lambda step: race.lost(folder, step, cfg.race, evaluations)


def settle_steps(cfg: DictConfig, data: DreamBoothData) -> None:
    """Convert `trainer.max_epochs` to steps, now that the size of an epoch is known.

    Raises:
        ConfigError: the number of steps conflicts with another key.
    """
    if cfg.trainer.max_epochs is not None:
        an_epoch = data.schedule.batches_per_epoch / cfg.trainer.accumulate_grad_batches
        cfg.trainer.max_steps, cfg.trainer.max_epochs = max(1, round(cfg.trainer.max_epochs * an_epoch)), None
        check(cfg)


def build_module(
    cfg: DictConfig, family: Family, data: DreamBoothData, folder: RunFolder, tables: Sequence[Table] = ()
) -> DreamBooth:
    """The LightningModule with its adapter attached; shows the preflight and writes it to the folder."""
    module, layers = build_method(cfg, family)
    if leads():
        needs = needed(cfg, data, module)
        disk.require(folder.root, needs, WAY_OUT)
        folder.save_config(cfg)
        folder.save_environment(str(family.device))
        preflight.show(cfg, data, module, layers, folder, needs, tables)
    return module


def needed(cfg: DictConfig, data: DreamBoothData, module: DreamBooth) -> dict[str, float]:
    """Maximum size of the run's folder in bytes, by purpose."""
    learning = sum(p.numel() * p.element_size() for p in module.trainable_parameters().values())
    numbers = sum(p.numel() for p in module.trainable_parameters().values())
    form = export_form(cfg, module.family)
    exported = (numbers * form.dtype.itemsize + disk.HEADER) * module.adapter.copies(form.formats)
    return disk.of_run(cfg, learning, exported, builders.evaluations(cfg, cfg.validation, data))


def fit(trainer: Trainer, module: DreamBooth, data: DreamBoothData, checkpoint: Path | None) -> None:
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        if trainer.interrupted:  # Lightning turns Ctrl-C into an exit
            raise KeyboardInterrupt from None
        raise


def build_trainer(cfg: DictConfig, folder: RunFolder, callbacks: Callbacks, phases: Phases) -> Trainer:
    """The Trainer, with its callbacks and loggers."""
    return Trainer(
        accelerator=device_of(cfg.trainer.accelerator).type, devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        strategy=build_strategy(cfg), precision="32-true",
        max_steps=cfg.trainer.max_steps, max_epochs=-1, accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        gradient_clip_val=cfg.trainer.gradient_clip_norm or None, deterministic=cfg.trainer.deterministic,
        callbacks=callbacks.callbacks, plugins=[AtomicCheckpointIO()], logger=callbacks.loggers or False,
        default_root_dir=folder.root, profiler=phases,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip


def release() -> None:
    """Free a run's memory, so that the next run in this process starts in the same state."""
    gc.unfreeze()  # an import while a model was loaded has frozen the model's objects too
    heap.trim()
    if "torch._dynamo" in sys.modules:  # compiled blocks, and how often each was compiled
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
