"""The optimiser, its parameter groups, and the learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from math import cos, pi
from typing import Any, NamedTuple

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import ConfigError, enums
from .rounding import with_stochastic_rounding

LORA_B = ("lora_B", "lora_up")  # in parameter names: the matrix that starts at 0


STATES = {  # float32 values of the optimiser's state per trained parameter
    "torch.optim.AdamW": 2, "lion_pytorch.Lion": 1, "prodigyopt.Prodigy": 4, "schedulefree.AdamWScheduleFree": 2,
}  # fmt: skip
IN_8_BITS = 4096  # minimum size of a tensor whose moments bitsandbytes stores in 8 bits


class Rate(NamedTuple):
    """Learning rate and weight decay of a parameter."""

    ratio: float  # factor of the run's learning rate
    decays: bool  # has weight decay


def build_optimizer(cfg: DictConfig, learning: Mapping[str, Tensor], rates: Mapping[str, Rate], seed: int = 0) -> Optimizer:
    """Build the optimiser that `cfg` names, with one parameter group per `Rate`. The group with ratio 1 comes first; its learning
    rate is logged.

    Args:
        learning, rates: by parameter name.
        seed: of the stochastic rounding of weights in lower precision than float32.
    """
    grouped: dict[Rate, list[Tensor]] = {}
    for name, parameter in learning.items():
        grouped.setdefault(rates[name], []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": own, "lr": cfg.lr * rate.ratio, "weight_decay": cfg.weight_decay if rate.decays else 0.0}
        for rate, own in sorted(grouped.items(), key=lambda item: (item[0].ratio != 1, item[0]))
    ]
    options = {str(key): tuple(v) if isinstance(v, ListConfig) else v for key, v in cfg.options.items()}
    kind: Any = get_class(cfg._target_)
    if any(parameter.dtype is not torch.float32 for parameter in learning.values()):
        kind = with_stochastic_rounding(kind, seed)
    return kind(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, **options)


def state_bytes(target: str, learning: Iterable[Tensor]) -> int:
    """Bytes of an optimiser's state, by the name of its class; for other classes, those of AdamW."""
    if target == "torch.optim.Adafactor":
        return sum(4 * (p.numel() if p.ndim < 2 else sum(p.flatten(1).shape)) for p in learning)
    if target.endswith("8bit"):
        return sum(2 * p.numel() if p.numel() >= IN_8_BITS else 8 * p.numel() for p in learning)
    return sum(4 * STATES.get(target, 2) * p.numel() for p in learning)


def check_installed(cfg: DictConfig) -> None:
    """Check, before any work, that the optimiser can be built.

    Raises:
        ConfigError: the class or an option does not exist, or the class refuses an option's value.
    """
    try:
        kind = get_class(cfg._target_)
    except Exception as error:  # Hydra raises several kinds
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"optimizer._target_ is {cfg._target_!r}, which can't be imported ({reason}); see conf/optimizer/"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(f"optimizer._target_ is {cfg._target_!r}, which is no torch.optim.Optimizer; see conf/optimizer/")
    known = sorted(set(signature(kind).parameters) - {"params", "lr", "weight_decay"})
    for option in cfg.options:
        if option not in known:
            near = ", ".join(get_close_matches(option, known, n=3, cutoff=0.3) or known)
            raise ConfigError(f"optimizer.options has {option!r}, which {cfg._target_} does not accept; similar: {near}")
    try:
        build_optimizer(cfg, {"": nn.Parameter(torch.zeros(2, 2))}, {"": Rate(1.0, True)})
    except Exception as error:  # every library has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        prefix = f"optimizer.options is {OmegaConf.to_container(cfg.options, resolve=True)}"
        raise ConfigError(f"{prefix}, which {cfg._target_} refuses ({reason}); correct it, or see conf/optimizer/") from error


def add_lora_plus(name: str, ratio: float) -> float:
    """LoRA+ (Hayou et al. 2024): the learning rate of B is `ratio` times that of A."""
    return ratio if any(end in name for end in LORA_B) else 1.0


def build_schedule(cfg: DictConfig, optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, learning_rate(cfg.schedule, cfg.warmup_steps, steps, cfg.cycles))


def set_rates(schedule: LambdaLR) -> None:
    """Set the learning rates of the current schedule: a checkpoint restores those of the schedule with which it was saved."""
    for group, peak, share in zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = peak * share(schedule.last_epoch)


def learning_rate(schedule: enums.Schedule, warmup: int, total: int, cycles: int = 1) -> Callable[[int], float]:
    """Factor of the learning rate by optimiser step: linear warm-up from 1/warmup, then constant, linear to 0, a half cosine to
    0, or `cycles` half cosines that each start at 1. From step `total` on, the factor is that of the last step."""

    def share(step: int) -> float:
        step = min(step, total - 1)
        if step < warmup:
            return (step + 1) / warmup
        if schedule is enums.Schedule.constant:
            return 1.0
        done = (step - warmup) / (total - warmup)  # below 1
        if schedule is enums.Schedule.linear:
            return 1.0 - done
        turns = cycles if schedule is enums.Schedule.restarts else 1
        return 0.5 + 0.5 * cos(pi * (done * turns % 1))

    return share
