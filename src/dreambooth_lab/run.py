"""One run, as the list of the things it is made of: preflight → build → fit → export → report."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig
from rich.console import Console

from . import draw, preflight, report
from .adapter import Adapter
from .config import ConfigError, rare_word, words
from .data.module import DreamBoothData
from .draw import Purpose
from .dreambooth import DreamBooth
from .learned_text import LearnedText
from .models.family import Family
from .optimizer import require as require_optimizer
from .phases import Phases
from .quant import Quantiser, require
from .runfolder import RunFolder
from .watching import Watchers, build_watchers

log = logging.getLogger(__name__)

TEXT_ENCODERS = 3  # for which conf/quant has keys


def run(cfg: DictConfig, root: Path) -> dict[str, float]:
    """Train as a checked config says, in the folder `root`; returns the last step's numbers.

    Raises:
        ConfigError: something the files or the machine can't give; nothing has been trained then.
    """
    quiet_libraries()
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
        watchers = build_watchers(cfg, folder, data, family, start[1] if start else 0, leads=_rank() == 0)
        trainer = build_trainer(cfg, folder, watchers, phases)
        fit(trainer, module, data, start[0] if start else None)
    if not trainer.is_global_zero:
        return {}
    folder.save_cost(phases.cost())
    report.write(folder)
    Console().print(phases.table())
    log.info("done: %s", folder.report)
    return watchers.metrics.last


def build_module(cfg: DictConfig, family: Family, data: DreamBoothData, folder: RunFolder) -> DreamBooth:
    """The method with its adapter attached; what is about to run is shown, and written to the folder."""
    adapter, text = build_adapter(cfg), build_text(cfg, family)
    layers = attach(cfg, family, adapter, text)
    module = DreamBooth(cfg, family, adapter, text).train()
    if _rank() == 0:
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


def build(cfg: DictConfig, group: str, kind: type, *but: str, **more: Any) -> Any:
    """The object that a config group names by `_target_`, made from the group's other keys but some, and from what more is said.

    Raises:
        ConfigError: `_target_` is no subclass of `kind`. Configurations come in the headers of strangers' files too, and must not
            choose what is called.
    """
    node = cfg[group]
    target = get_class(node._target_)
    if not issubclass(target, kind):
        raise ConfigError(
            f"{group}._target_ is {node._target_!r}, which is no {kind.__name__} of this project; see conf/{group}/"
        )
    return target(**{str(key): value for key, value in node.items() if key not in ("_target_", *but)}, **more)


def build_adapter(cfg: DictConfig) -> Adapter:
    """The adapter, not yet attached; what else the group says is for `build_text`, `attach` and the optimiser."""
    return build(cfg, "adapter", Adapter, "init_from", "text_encoders", "text_lr_ratio", "train_token", "token", "token_lr_ratio")


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
    cache = Path(cfg.cache).expanduser()
    family: Family = build(cfg, "model", Family, "usual", cache=cache)
    family.device = _device(cfg.trainer.accelerator, cfg.trainer.devices)
    family.check_device()
    require_teachable(cfg, family)
    kinds = {family.denoiser_part: cfg.quant.kind}
    kinds |= {part: cfg.quant[f"text_encoder_{i}"] for i, part in enumerate(family.text_encoder_parts, 1) if i <= TEXT_ENCODERS}
    for kind in kinds.values():
        require(kind, family.device)
    family.quantiser = Quantiser(kinds, cache / "quant" if cfg.quant.cache else None)
    return family


def require_teachable(cfg: DictConfig, family: Family) -> None:
    """Refuse to teach text encoders that can't learn here: adapters and learned tokens are for CLIP's.

    Raises:
        ConfigError: names those that can.
    """
    able = [number for number, part in enumerate(family.text_encoder_parts, 1) if part in family.teachable_parts]
    if beyond := [number for number in cfg.adapter.text_encoders if number not in able]:
        raise ConfigError(f"adapter.text_encoders has {beyond}; of this model's text encoders those that can learn are {able}")
    if cfg.adapter.train_token and not able:
        raise ConfigError("adapter.train_token is true, but no text encoder of this model can learn; set it to false")


class Trained:
    """The base model's diffusers pipeline with an export in it.

    Args:
        cfg: of the run that made it.
        export: the folder it wrote, or a file of it.
    """

    def __init__(self, cfg: DictConfig, export: Path):
        self.family, word = build_family(cfg), learned_word(cfg)
        family = self.family
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

    def draw(self, prompt: str, negative: str, edge: int, steps: int, guidance: float, seed: int, image: Any = None) -> list[Any]:
        """One picture.

        Args:
            negative: empty for the unconditional input, as in training.
            edge: of the square, px.
            image: to begin from, for models that change a given one.
        """
        self.pipeline.set_progress_bar_config(disable=True)
        said: dict[str, Any] = {"negative_prompt": negative} if negative else {}
        said |= self.family.begin(image) if image else {"height": edge, "width": edge}
        return self.pipeline(
            prompt=prompt, num_inference_steps=steps, **said, **self.family.guidance(guidance),
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip


def _device(accelerator: str, devices: int = 1) -> torch.device:
    """This process's own."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator is 'gpu', but torch sees no CUDA device; use trainer.accelerator=cpu or auto")
    if accelerator == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if devices > torch.cuda.device_count():
        raise ConfigError(f"trainer.devices is {devices}, but torch sees {torch.cuda.device_count()} CUDA device(s); use as many")
    return torch.device("cuda", _rank())


def _rank() -> int:
    """Which of the processes of one machine this is; Lightning starts the others of a run and numbers them."""
    return int(os.environ.get("LOCAL_RANK", 0))


def build_trainer(cfg: DictConfig, folder: RunFolder, watchers: Watchers, phases: Phases) -> Trainer:
    """The Trainer, with all that watches it."""
    return Trainer(
        accelerator="gpu" if _device(cfg.trainer.accelerator).type == "cuda" else "cpu", devices=cfg.trainer.devices,
        strategy=_strategy(cfg), precision="32-true",
        max_steps=cfg.trainer.max_steps, max_epochs=-1, accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
        gradient_clip_val=cfg.trainer.gradient_clip_norm or None, deterministic=cfg.trainer.deterministic,
        callbacks=watchers.callbacks, logger=watchers.loggers or False, default_root_dir=folder.root, profiler=phases,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip


def _strategy(cfg: DictConfig) -> Strategy | str:
    """With several devices a process for each, which has its own rows of every batch; the gradients are averaged."""
    if cfg.trainer.devices == 1:
        return "auto"
    return DDPStrategy(
        find_unused_parameters=bool(cfg.adapter.train_token or cfg.adapter.text_encoders),  # a rank's rows may not say the token
        init_sync=False, forward_sync_buffers=False,  # all make the same weights from the seed
        timeout=timedelta(days=1),  # the others wait while the first draws pictures
    )  # fmt: skip


def quiet_libraries() -> None:
    """Silence advice that doesn't apply here; warnings about the work itself stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*")
