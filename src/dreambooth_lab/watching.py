"""Everything that watches a run, built from its configuration: callbacks in their order, and loggers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hydra.utils import get_class
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig

from .callbacks.checkpoint import Best, Checkpoints
from .callbacks.ema import Ema, Looks
from .callbacks.eval_loss import EvalLoss
from .callbacks.export import Export
from .callbacks.metrics import MetricsFile, StepMetrics
from .callbacks.periodic import Timetable
from .callbacks.preview import Farewell, Previews, SentNumbers
from .callbacks.progress import Bar
from .callbacks.scores import Scores
from .callbacks.validation import Validation
from .callbacks.webhook import Sender, build_receiver
from .data.held_out import exams
from .data.module import DreamBoothData
from .models.family import Family
from .models.judges import Clip, Dino, MaskedDino
from .runfolder import RunFolder


class Watchers(NamedTuple):
    callbacks: list[Callback]
    loggers: list[Logger]
    metrics: StepMetrics


def build_watchers(cfg: DictConfig, folder: RunFolder, data: DreamBoothData, family: Family, step: int, leads: bool) -> Watchers:
    """What logs comes before what reads the logged; checkpoints are last, when all are up to date. Of several ranks the first
    alone draws and writes; all share the work of the eval loss.

    Args:
        step: of the checkpoint that the run goes on from; 0 for a new one.
        leads: whether this is the first rank.
    """
    metrics = StepMetrics(cfg.trainer.log_every_n_steps)
    numbers, sender = (MetricsFile(folder, keep_to=step), build_sender(cfg)) if leads else (None, None)
    ema = Ema(cfg.ema.decay, cfg.ema.update_interval, cfg.ema.device) if cfg.ema.enabled else None
    looks, export = Looks(ema, cfg.ema.validation), Export(cfg, folder, ema) if leads else None
    rows = cfg.dataset.batch_size * cfg.trainer.accumulate_grad_batches * cfg.trainer.devices
    callbacks: list[Callback | None] = [
        metrics,
        Bar(metrics, data, rows) if leads and cfg.trainer.progress else None,
        ema,
        build_eval_loss(cfg, folder, data, looks),
        build_validation(cfg, folder, data, family, looks, sender) if leads else None,
        Best(cfg.checkpoint, folder, numbers, export) if cfg.checkpoint.monitor else None,
        export,
        Checkpoints(folder, cfg.checkpoint.every_n_steps, cfg.checkpoint.keep_all),
        Farewell(sender) if sender else None,
    ]
    loggers: list[Logger] = [numbers, *build_loggers(cfg, folder, step)] if numbers else []
    loggers += [SentNumbers(sender, folder.root.name)] if sender else []
    return Watchers([callback for callback in callbacks if callback], loggers, metrics)


def timetable(cfg: DictConfig, node: DictConfig, data: DreamBoothData) -> Timetable:
    """When `node.every_n_steps` and `node.every_n_epochs` say."""
    epoch = data.schedule.batches_per_epoch / cfg.trainer.accumulate_grad_batches
    return Timetable(node.every_n_steps, node.every_n_epochs, epoch, cfg.trainer.max_steps)


def build_eval_loss(cfg: DictConfig, folder: RunFolder, data: DreamBoothData, looks: Looks) -> EvalLoss | None:
    """The exams of the eval datasets, if there are any, in batches of training's size, which are known to fit."""
    asked = exams(data, cfg.eval.timesteps, cfg.dataset.batch_size)
    return EvalLoss(timetable(cfg, cfg.eval, data), asked, folder, looks) if asked else None


def build_validation(
    cfg: DictConfig, folder: RunFolder, data: DreamBoothData, family: Family, looks: Looks, sender: Sender | None
) -> Validation | None:
    """Pictures while it trains, and their way to the webhooks if there are any."""
    node = cfg.validation
    if not (node.every_n_steps or node.every_n_epochs):
        return None
    if cfg.preview.enabled:
        family.preview(torch.zeros(1, family.channels, 8, 8))  # what can't be decoded is refused now, not at the first picture
    previews = Previews(cfg.preview, sender, family, folder.root.name) if sender else None
    scores = build_scores(cfg, folder, data, family.device)
    return Validation(timetable(cfg, node, data), node, data, folder, looks, previews, scores)


def build_scores(cfg: DictConfig, folder: RunFolder, data: DreamBoothData, device: torch.device) -> Scores | None:
    """The judges that the configuration names, if any; they stay in memory for the run."""
    make = {"device": device, "batch_size": cfg.eval.batch_size}
    clip = Clip(cfg.eval.clip_model, "eval.clip_model", **make) if cfg.eval.clip_model else None
    dino = Dino(cfg.eval.dino_model, "eval.dino_model", **make) if cfg.eval.dino_model else None
    made = {"clip_i": clip, "dino": dino, "dino_masked": MaskedDino(dino) if dino else None}
    judges = {name: judge for name, judge in made.items() if judge}
    if not judges:
        return None
    return Scores(folder, clip, judges, data.photos(), cfg.dataset.instance_prompt, cfg.dataset.class_prompt)


def build_sender(cfg: DictConfig) -> Sender | None:
    receivers = [build_receiver(str(label), receiver) for label, receiver in cfg.webhook.receivers.items()]
    return Sender(receivers) if receivers else None


def build_loggers(cfg: DictConfig, folder: RunFolder, step: int) -> list[Logger]:
    """Lightning's loggers that the configuration names."""
    places = {"{folder}": str(folder.root), "{run}": folder.root.name, "{next_step}": step + 1}
    made = []
    for said in cfg.logger.loggers.values():
        options = {str(key): places.get(value, value) if isinstance(value, str) else value for key, value in said.options.items()}
        made.append(get_class(said._target_)(**options))
    return made
