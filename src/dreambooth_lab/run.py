"""One run, as the list of the things it is made of: preflight → build → fit → export → report."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig
from rich.console import Console

from . import draw, preflight, report
from .adapter import Adapter
from .callbacks.checkpoint import Checkpoints
from .callbacks.ema import Ema
from .callbacks.export import Export
from .callbacks.metrics import MetricsFile, StepMetrics
from .callbacks.preview import Previews
from .callbacks.progress import Bar
from .callbacks.scores import Scores
from .callbacks.validation import Validation
from .callbacks.webhook import Sender, build_receiver
from .config import ConfigError
from .data.module import DreamBoothData
from .draw import Purpose
from .dreambooth import DreamBooth
from .embedding import rare_word, words
from .learned_text import LearnedText
from .models.family import Family
from .models.judges import Clip, Dino, Judge
from .optimizer import require as require_optimizer
from .phases import Phases
from .quant import Quantiser, require
from .runfolder import RunFolder

log = logging.getLogger(__name__)


def run(cfg: DictConfig, root: Path) -> dict[str, float]:
    """Train as a checked config says, in the folder `root`; returns the last step's numbers.

    Raises:
        ConfigError: something the files or the machine can't give; nothing has been trained then.
    """
    _quiet_libraries()
    folder, phases = RunFolder(root), Phases()
    start = folder.newest() if cfg.resume else None
    require_optimizer(cfg.optimizer)
    family = build_family(cfg)
    with phases("photos, text and caches"):
        data = DreamBoothData(cfg, family)
        data.prepare()
    with phases("adapter and preflight"):
        module = build_module(cfg, family, data, folder)
    if cfg.preflight == "only":
        return {}
    with phases("training"):
        trainer, metrics = build_trainer(cfg, folder, data, family, start[1] if start else 0, phases)
        fit(trainer, module, data, start[0] if start else None)
    folder.save_cost(phases.cost())
    report.write(folder)
    Console().print(phases.table())
    log.info("done: %s", folder.report)
    return metrics.last


def build_module(cfg: DictConfig, family: Family, data: DreamBoothData, folder: RunFolder) -> DreamBooth:
    """The method with its adapter attached; what is about to run is shown, and written to the folder."""
    adapter, text = build_adapter(cfg), build_text(cfg, family)
    layers = attach(cfg, family, adapter, text)
    module = DreamBooth(cfg, family, adapter, text).train()
    folder.save_config(cfg)
    folder.save_environment(str(family.device))
    preflight.show(cfg, data, module, layers, folder.preflight)
    return module


def fit(trainer: Trainer, module: DreamBooth, data: DreamBoothData, checkpoint: Path | None) -> None:
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        if trainer.interrupted:  # Lightning turns Ctrl-C into an exit
            raise KeyboardInterrupt from None
        raise


def build(node: DictConfig, *but: str) -> Any:
    """The object that a config group names by `_target_`, made from the group's other keys but some."""
    return get_class(node._target_)(**{str(key): value for key, value in node.items() if key not in ("_target_", *but)})


def build_adapter(cfg: DictConfig) -> Adapter:
    """The adapter, not yet attached; what else the group says is for `build_text`, `attach` and the optimiser."""
    return build(cfg.adapter, "init_from", "text_encoders", "text_lr_ratio", "train_token", "token", "token_lr_ratio")


def build_text(cfg: DictConfig, family: Family) -> LearnedText | None:
    """The text encoders, if they or the rare token learn."""
    word = learned_word(cfg)
    return LearnedText(family, word, bool(cfg.adapter.text_encoders)) if word or cfg.adapter.text_encoders else None


def attach(cfg: DictConfig, family: Family, adapter: Adapter, text: LearnedText | None) -> list[str]:
    """Put the adapter on all that learns, with the weights it starts from; returns the layers' names."""
    layers = adapter.attach(family.denoiser, family.learns, draw.torch_seed(cfg.seed, 0, Purpose.ADAPTER_INIT))
    for number, part in enumerate(family.text_encoder_parts, 1):
        if text and number in cfg.adapter.text_encoders:
            seed = draw.torch_seed(cfg.seed, number, Purpose.ADAPTER_INIT)
            layers += adapter.attach_text(part, text.encoders[part], family.text_learns, seed)
    adapter.refuse_idle_rules(layers)
    if cfg.adapter.init_from:
        adapter.take(Path(cfg.adapter.init_from).expanduser())
    return layers


def learned_word(cfg: DictConfig) -> str | None:
    """The rare token, if its embedding learns.

    Raises:
        ConfigError: which word of the instance prompt it is can't be told.
    """
    if not cfg.adapter.train_token:
        return None
    word = cfg.adapter.token or rare_word(cfg.dataset.instance_prompt, cfg.dataset.class_prompt)
    if word is None or word.lower() not in words(cfg.dataset.instance_prompt):
        raise ConfigError(
            f"adapter.train_token is true, but the rare word of dataset.instance_prompt={cfg.dataset.instance_prompt!r} is not "
            "clear; set adapter.token to it, or dataset.class_prompt to the same prompt without it"
        )
    return word


def build_family(cfg: DictConfig) -> Family:
    """The model family on the run's device; no weights are loaded yet."""
    family: Family = build(cfg.model)
    family.device = _device(cfg.trainer.accelerator)
    family.check_device()
    there = len(family.text_encoder_parts) if family.text_learns else 0
    if beyond := [number for number in cfg.adapter.text_encoders if number > there]:
        raise ConfigError(f"adapter.text_encoders has {beyond}, but of this model's text encoders {there} can learn")
    kinds = {family.denoiser_part: cfg.quant.kind}
    kinds |= {part: cfg.quant[f"text_encoder_{i}"] for i, part in enumerate(family.text_encoder_parts, 1)}
    for kind in kinds.values():
        require(kind, family.device)
    family.quantiser = Quantiser(kinds, Path(cfg.cache).expanduser() / "quant" if cfg.quant.cache else None)
    return family


class Trained:
    """The base model's diffusers pipeline with an export in it.

    Args:
        cfg: of the run that made it.
        export: the folder it wrote, or a file of it.
    """

    def __init__(self, cfg: DictConfig, export: Path):
        family, word = build_family(cfg), learned_word(cfg)
        self.adapter, self.pipeline = build_adapter(cfg), family.pipeline()
        self.adapter.load_into(self.pipeline, family.denoiser_part, export, family.learns)
        folder = export if export.is_dir() else export.parent
        self.mean = family.load_token(self.pipeline, folder, word) if word else None
        self.pipeline.to(family.device)

    def strengthen(self, strength: float) -> None:
        """Scale what was learned: 0 is the base model, 1 what was trained."""
        self.adapter.strengthen(self.pipeline, strength)
        if self.mean:
            self.mean(strength)


def _device(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator is 'gpu', but torch sees no CUDA device; use trainer.accelerator=cpu or auto")
    return torch.device("cuda", 0) if accelerator != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def build_validation(cfg: DictConfig, folder: RunFolder, data: DreamBoothData, family: Family) -> Validation:
    """Pictures while it trains, and their way to the webhooks if there are any."""
    receivers = [build_receiver(str(label), receiver) for label, receiver in cfg.webhook.receivers.items()]
    if cfg.preview.enabled:
        family.preview(torch.zeros(1, family.channels, 8, 8))  # what can't be decoded is refused now, not at the first picture
    previews = Previews(cfg.preview, Sender(receivers), family, folder.root.name) if receivers else None
    return Validation(cfg.validation, data, folder, previews, build_scores(cfg, folder, data, family.device))


def build_scores(cfg: DictConfig, folder: RunFolder, data: DreamBoothData, device: torch.device) -> Scores | None:
    """The judges that the configuration names, if any; they stay in memory for the run."""
    make = {"device": device, "batch_size": cfg.eval.batch_size}
    clip = Clip(cfg.eval.clip_model, "eval.clip_model", **make) if cfg.eval.clip_model else None
    dino = Dino(cfg.eval.dino_model, "eval.dino_model", **make) if cfg.eval.dino_model else None
    judges: dict[str, Judge] = {name: judge for name, judge in {"clip_i": clip, "dino": dino}.items() if judge}
    if not judges:
        return None
    return Scores(folder, clip, judges, data.photos(), cfg.dataset.instance_prompt, cfg.dataset.class_prompt)


def build_trainer(
    cfg: DictConfig, folder: RunFolder, data: DreamBoothData, family: Family, step: int, phases: Phases
) -> tuple[Trainer, StepMetrics]:
    """The Trainer with every callback, checkpoints last."""
    metrics = StepMetrics(cfg.trainer.log_every_n_steps)
    ema = Ema(cfg.ema.decay, cfg.ema.update_interval, cfg.ema.device) if cfg.ema.enabled else None
    callbacks: list[Callback | None] = [
        metrics,
        Bar(metrics) if cfg.trainer.progress else None,
        ema,
        build_validation(cfg, folder, data, family) if cfg.validation.every_n_steps else None,
        Export(cfg, folder, ema),
        Checkpoints(folder, cfg.checkpoint.every_n_steps, cfg.checkpoint.keep_all),
    ]
    trainer = Trainer(
        accelerator="gpu" if _device(cfg.trainer.accelerator).type == "cuda" else "cpu", devices=1, precision="32-true",
        max_steps=cfg.trainer.max_steps, max_epochs=-1, accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        gradient_clip_val=cfg.trainer.gradient_clip_norm or None, deterministic=cfg.trainer.deterministic,
        callbacks=[c for c in callbacks if c], logger=_loggers(cfg, folder, step), default_root_dir=folder.root, profiler=phases,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    return trainer, metrics


def _loggers(cfg: DictConfig, folder: RunFolder, step: int) -> list[Logger]:
    loggers: list[Logger] = [MetricsFile(folder, keep_to=step)]
    if cfg.logger.tensorboard:
        loggers.append(TensorBoardLogger(folder.root, name="tensorboard", version="", purge_step=step + 1))
    return loggers


def _quiet_libraries() -> None:
    """Silence advice that doesn't apply here; warnings about the work itself stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
