"""Builds a run's callbacks, in their order, and loggers from its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from hydra.utils import get_class
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig

from ..config import ConfigError, Subject, rows_per_step
from ..data.eval_batches import eval_batches
from ..data.module import DreamBoothData, without_word
from ..models.family import Family
from ..models.feature_extractors import Clip, Dino, MaskedDino
from ..runfolder import RunFolder
from . import retrieval
from .checkpoint import Best, Checkpoints
from .ema import Ema, EvalWeights
from .eval_loss import EvalLoss
from .export import Export
from .finite import Finite, UnchangedWeights
from .interruption import Interruption
from .leakage import Leakage, Pair
from .metrics import MetricsFile, StepMetrics
from .periodic import Interval
from .power_ema import PowerEma
from .preview import CloseWebhooks, Previews, WebhookLogger
from .progress import Bar, TimeLeft
from .race import Race
from .scores import Scores
from .validation import Validation
from .webhook import Sender, build_receiver

log = logging.getLogger(__name__)


class Callbacks(NamedTuple):
    callbacks: list[Callback]
    loggers: list[Logger]
    metrics: StepMetrics


def build_callbacks(
    cfg: DictConfig,
    folder: RunFolder,
    data: DreamBoothData,
    family: Family,
    step: int,
    leads: bool,
    lost: Callable[[int], str | None] | None = None,
) -> Callbacks:
    """Callbacks that log come before those that read the logs; checkpoints are last, when all states are up to date. Only the
    first rank writes; all ranks share the work of the images and of the eval loss.

    Args:
        step: of the checkpoint that the run resumes from; 0 for a new run.
        leads: whether this is the first rank.
        lost: step → why the run need not go on, or None; only in a race (`race`).
    """
    metrics = StepMetrics(cfg.trainer.log_every_n_steps)
    kept = step or -1  # a run that starts again writes its step 0 again
    metrics_file, sender = (MetricsFile(folder, kept), build_sender(cfg)) if leads else (None, None)
    ema = Ema(cfg.ema.decay, cfg.ema.update_interval, cfg.ema.device) if cfg.ema.enabled else None
    weights, export = EvalWeights(ema, cfg.ema.validation), Export(cfg, folder, ema, data.tags()) if leads else None
    checkpoints = Checkpoints(folder, cfg.checkpoint.every_n_steps, cfg.checkpoint.keep)
    interruption = Interruption(folder, checkpoints, export)
    callbacks: list[Callback | None] = [
        metrics,
        Bar(metrics, data, rows_per_step(cfg), time_left(cfg, data)) if leads and cfg.trainer.progress else None,
        ema,
        *build_power_averages(cfg, folder),
        build_eval_loss(cfg, folder, data, weights),
        build_leakage(cfg, folder, data, weights) if cfg.eval.leakage else None,
        build_validation(cfg, folder, data, family, weights, sender, leads),
        Best(cfg.checkpoint, folder, metrics_file, export) if cfg.checkpoint.monitor else None,
        export,
        Finite(cfg.trainer.skip_nonfinite_steps),
        UnchangedWeights(cfg.checkpoint.every_n_steps),
        checkpoints,
        CloseWebhooks(sender) if sender else None,
        interruption,
        Race(interval(cfg, cfg.eval, data), lost, interruption) if lost else None,
    ]
    loggers: list[Logger] = [metrics_file, *build_loggers(cfg, folder, step)] if metrics_file else []
    loggers += [WebhookLogger(sender, folder.root.name)] if sender else []
    return Callbacks([callback for callback in callbacks if callback], loggers, metrics)


def build_power_averages(cfg: DictConfig, folder: RunFolder) -> list[PowerEma]:
    """The averages of `ema.lengths`."""
    return [PowerEma(length, cfg.ema.update_interval, cfg.ema.snapshot_every_n_steps, folder) for length in cfg.ema.lengths]


def time_left(cfg: DictConfig, data: DreamBoothData) -> TimeLeft:
    """The schedules of future evaluations, by the names of their phases."""
    watched = {"images": cfg.validation} | ({"eval loss": cfg.eval} if data.held_out else {})
    due = {phase: interval(cfg, node, data) for phase, node in watched.items() if node.every_n_steps or node.every_n_epochs}
    return TimeLeft(due, cfg.trainer.max_steps)


def interval(cfg: DictConfig, node: DictConfig, data: DreamBoothData) -> Interval:
    """The schedule of `node.every_n_steps` and `node.every_n_epochs`."""
    epoch = data.schedule.batches_per_epoch / cfg.trainer.accumulate_grad_batches
    return Interval(node.every_n_steps, node.every_n_epochs, epoch, cfg.trainer.max_steps)


def evaluations(cfg: DictConfig, node: DictConfig, data: DreamBoothData) -> int:
    """How often the interval occurs in the run, including its start and end."""
    if not (node.every_n_steps or node.every_n_epochs):
        return 0
    due = interval(cfg, node, data).due
    return 1 + sum(due(step) for step in range(1, cfg.trainer.max_steps + 1))


def build_eval_loss(cfg: DictConfig, folder: RunFolder, data: DreamBoothData, weights: EvalWeights) -> EvalLoss | None:
    """The eval batches of the eval datasets, if there are any, with the training batch size, which is known to fit."""
    batches = eval_batches(data, cfg.eval.timesteps, cfg.dataset.batch_size)
    return EvalLoss(interval(cfg, cfg.eval, data), batches, folder, weights) if batches else None


def build_leakage(cfg: DictConfig, folder: RunFolder, data: DreamBoothData, weights: EvalWeights) -> Leakage:
    """The eval batches of the images whose caption has the rare word, with it and without it.

    Raises:
        ConfigError: there are none.
    """

    def kept(caption: str) -> str | None:
        return None if without_word(cfg, caption) is None else caption

    asked = [eval_batches(data, cfg.eval.timesteps, cfg.dataset.batch_size, one) for one in (kept, partial(without_word, cfg))]
    if not asked[0]:
        some = repr(data.held_out[0].captions[0]) if data.held_out else "there are none"
        raise ConfigError(
            f"eval.leakage is true, but no eval image's caption has the rare word (the first: {some}); caption them with "
            "the instance prompt (dataset.caption, dataset.prepend_instance_prompt), or set eval.leakage=false"
        )
    return Leakage(interval(cfg, cfg.eval, data), [Pair(*pair) for pair in zip(*asked, strict=True)], folder, weights)


def build_validation(
    cfg: DictConfig,
    folder: RunFolder,
    data: DreamBoothData,
    family: Family,
    weights: EvalWeights,
    sender: Sender | None,
    leads: bool,
) -> Validation | None:
    """Validation images, and their webhooks if there are any."""
    node = cfg.validation
    if not (node.every_n_steps or node.every_n_epochs):
        return None
    if cfg.preview.enabled:
        family.preview(torch.zeros(1, family.channels, 8, 8))  # a missing decoder is refused now, not at the first image
    previews = Previews(cfg.preview, sender, family, folder.root.name) if sender else None
    scores = build_scores(cfg, folder, data, family.device) if leads else None
    return Validation(interval(cfg, node, data), node, data, folder, weights, previews, scores)


def build_scores(cfg: DictConfig, folder: RunFolder, data: DreamBoothData, device: torch.device) -> Scores | None:
    """The configured feature extractors, if any; between evaluations they are off the device."""
    make = {"device": device, "batch_size": cfg.eval.batch_size}
    clip = Clip(cfg.eval.clip_model, "eval.clip_model", **make) if cfg.eval.clip_model else None
    dino = Dino(cfg.eval.dino_model, "eval.dino_model", **make) if cfg.eval.dino_model else None
    masked, photos = MaskedDino(dino) if dino else None, data.photos()
    made = {"clip_i": clip, "dino": dino, "dino_masked": masked}
    extractors = {name: extractor for name, extractor in made.items() if extractor}
    if not extractors:
        return None
    if masked and (share := masked.under_masks(photos)) is not None:
        log.info("dino_masked: %.0f %% of its foreground patches in the photos are inside the masks", 100 * share)
    look_alikes = retrieval.embed(data.gallery, extractors, cfg.eval.batch_size) if data.gallery else None
    subject = Subject(cfg.dataset.instance_prompt, cfg.dataset.class_prompt, cfg.adapter.token)
    return Scores(folder, clip, extractors, photos, subject, look_alikes)


def build_sender(cfg: DictConfig) -> Sender | None:
    receivers = [build_receiver(str(label), receiver) for label, receiver in cfg.webhook.receivers.items()]
    return Sender(receivers) if receivers else None


def build_loggers(cfg: DictConfig, folder: RunFolder, step: int) -> list[Logger]:
    """The configured Lightning loggers."""
    places = {"{folder}": str(folder.root), "{run}": folder.root.name, "{next_step}": step + 1}
    made = []
    for text in cfg.logger.loggers.values():
        options = {str(key): places.get(value, value) if isinstance(value, str) else value for key, value in text.options.items()}
        made.append(get_class(text._target_)(**options))
    return made
