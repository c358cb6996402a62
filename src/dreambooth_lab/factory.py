"""Build the model family, the adapter and the text encoders that a configuration describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig

from . import draw, heap
from .adapter import Adapter
from .config import ConfigError, enums, is_sharded, processes, rare_word, words
from .draw import Purpose
from .dreambooth import DreamBooth
from .models.family import Family
from .quant import Quantiser, check_supported
from .trainable_text import TrainableText

TEXT_ENCODERS = 3  # for which conf/quant has keys


def instantiate(cfg: DictConfig, group: str, kind: type, *but: str, **more: Any) -> Any:
    """Instantiate the `_target_` of a config group with the group's other keys (except some) and further arguments.

    Raises:
        ConfigError: `_target_` is no subclass of `kind`. Configurations can come from the headers of untrusted files, which must
            not choose what is called.
    """
    node = cfg[group]
    strange = f"{group}._target_ is {node._target_!r}, which is no {kind.__name__} of this project; see conf/{group}/"
    try:
        with heap.imports():
            target = get_class(node._target_)
    except (ImportError, ValueError) as error:
        raise ConfigError(strange) from error
    if not issubclass(target, kind):
        raise ConfigError(strange)
    return target(**{str(key): value for key, value in node.items() if key not in ("_target_", *but)}, **more)


def build_adapter(cfg: DictConfig) -> Adapter:
    """The adapter, not yet attached; the group's other keys are for `build_trainable_text`, `attach` and the optimiser."""
    return instantiate(
        cfg, "adapter", Adapter, "init_from", "text_encoders", "text_lr_ratio", "train_token", "token", "token_lr_ratio"
    )


def build_trainable_text(cfg: DictConfig, family: Family) -> TrainableText | None:
    """The trainable text encoders, if they or the rare token are trained."""
    word = trained_token(cfg)
    return TrainableText(family, word, bool(cfg.adapter.text_encoders)) if word or cfg.adapter.text_encoders else None


def build_method(cfg: DictConfig, family: Family) -> tuple[DreamBooth, list[str]]:
    """The LightningModule with its adapter attached, ready to train, and the names of the adapted layers."""
    adapter, text = build_adapter(cfg), build_trainable_text(cfg, family)
    layers = attach(cfg, family, adapter, text)
    return DreamBooth(cfg, family, adapter, text).train(), layers


def attach(cfg: DictConfig, family: Family, adapter: Adapter, text: TrainableText | None) -> list[str]:
    """Attach the adapter to all adapted layers and load its initial weights; returns the layers' names."""
    layers = adapter.attach(family.denoiser, family.target_modules, draw.torch_seed(cfg.seed, 0, Purpose.ADAPTER_INIT))
    adapter.follow_time(family.denoiser, family.time_of)
    family.denoiser.to(family.device)  # adapters of offloaded blocks were created on the host, like the blocks
    for number, part in enumerate(family.text_encoder_parts, 1):
        if text and number in cfg.adapter.text_encoders:
            seed = draw.torch_seed(cfg.seed, number, Purpose.ADAPTER_INIT)
            layers += adapter.attach_text(part, text.encoders[part], family.text_target_modules, seed)
    adapter.check_unused_rules(layers)
    if cfg.adapter.init_from:
        adapter.load_weights(Path(cfg.adapter.init_from).expanduser())
    return layers


def trained_token(cfg: DictConfig) -> str | None:
    """The rare token, if its embedding is trained.

    Raises:
        ConfigError: it can't be identified in the instance prompt.
    """
    if not cfg.adapter.train_token:
        return None
    word = cfg.adapter.token or rare_word(cfg.dataset.instance_prompt, cfg.dataset.class_prompt)
    if word is None or word.lower() not in words(cfg.dataset.instance_prompt):
        raise ConfigError(
            f"adapter.train_token is true, but the rare word of dataset.instance_prompt={cfg.dataset.instance_prompt!r} can't be "
            "identified; set adapter.token to it, or dataset.class_prompt to the same prompt without it"
        )
    return word


def build_family(cfg: DictConfig) -> Family:
    """The model family on the run's device; no weights are loaded yet."""
    cache = Path(cfg.cache).expanduser()
    family: Family = instantiate(cfg, "model", Family, "recommended", cache=cache)
    family.device = device_of(cfg.trainer.accelerator, cfg.trainer.devices)
    family.shards = processes(cfg) if is_sharded(cfg) else 0
    family.check_device()
    require_supported(cfg, family)
    kinds = {family.denoiser_part: cfg.quant.kind}
    kinds |= {part: cfg.quant[f"text_encoder_{i}"] for i, part in enumerate(family.text_encoder_parts, 1) if i <= TEXT_ENCODERS}
    for kind in kinds.values():
        check_supported(kind, family.device)
    family.quantiser = Quantiser(kinds, cache / "quant" if cfg.quant.cache else None)
    return family


def require_supported(cfg: DictConfig, family: Family) -> None:
    """Refuse what the model can't do: train text encoders other than CLIP's, generate class images from prompts only.

    Raises:
        ConfigError: names the possible values.
    """
    if family.needs_image and cfg.prior.kind.has_class_rows and cfg.prior.source is enums.PriorSource.generated:
        raise ConfigError(
            "prior.source is generated, but this model is image-to-image and can't generate from prompts only; set "
            "prior.source=folder with class images in prior.path, or prior.source=captions"
        )
    validation = cfg.validation
    steers = validation.superclass is not enums.Superclass.none or validation.personal_guidance is not None
    if steers and not family.guides_in_one_batch:
        key = "superclass" if validation.superclass is not enums.Superclass.none else "personal_guidance"
        raise ConfigError(
            f"validation.{key} is set, which is there for SD, SDXL, SD3 and toybox only; leave validation.superclass and "
            "validation.personal_guidance out"
        )
    if cfg.adapter.rank_schedule is not enums.RankSchedule.none and family.clock is None:
        raise ConfigError(
            f"adapter.rank_schedule is {cfg.adapter.rank_schedule.name}, but this model's network has a clock not known here; "
            "use rank_schedule=none, or a model of conf/model/ other than diffusers"
        )
    able = [number for number, part in enumerate(family.text_encoder_parts, 1) if part in family.trainable_text_encoder_parts]
    if beyond := [number for number in cfg.adapter.text_encoders if number not in able]:
        raise ConfigError(f"adapter.text_encoders has {beyond}; the trainable text encoders of this model are {able}")
    if cfg.adapter.train_token and not able:
        raise ConfigError("adapter.train_token is true, but this model has no trainable text encoder; set it to false")


def device_of(accelerator: str, devices: int = 1) -> torch.device:
    """This process's device; `auto` takes CUDA, else Apple's GPU, else the CPU.

    Raises:
        ConfigError: torch does not find it, or not that many.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = {"gpu": "cuda", "auto": next(kind for kind, there in has.items() if there)}.get(accelerator, accelerator)
    if not has[kind]:
        raise ConfigError(f"trainer.accelerator is {accelerator!r}, but torch finds no {kind.upper()} device; use cpu or auto")
    if kind == "mps" and devices > 1:
        raise ConfigError(f"trainer.devices is {devices}, but MPS has only one device; set trainer.devices=1")
    if kind != "cuda":
        return torch.device(kind)
    if devices > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.devices is {devices}, but torch finds {torch.cuda.device_count()} CUDA device(s); use at most that many"
        )
    return torch.device("cuda", local_rank())


def local_rank() -> int:
    """The local rank of this process, as set by Lightning, torchrun or SLURM."""
    return _number("LOCAL_RANK", "SLURM_LOCALID")


def leads() -> bool:
    """Whether this is the first process of a run, which writes its folder."""
    return local_rank() == 0 and _number("NODE_RANK", "GROUP_RANK", "SLURM_NODEID") == 0


def _number(*variables: str) -> int:
    return next((int(os.environ[name]) for name in variables if name in os.environ), 0)
