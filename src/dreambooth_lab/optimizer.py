"""Which optimiser learns what at which rate, and how the rate changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from inspect import signature
from math import cos, pi
from typing import Any, NamedTuple

from hydra.utils import get_class
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import ConfigError, Schedule

LORA_B = ("lora_B", "lora_up")  # in parameter names: the matrix that starts at 0


class Rate(NamedTuple):
    """How a parameter learns."""

    ratio: float  # its learning rate over the run's
    decays: bool


def build_optimizer(cfg: DictConfig, learning: Mapping[str, Tensor], rates: Mapping[str, Rate]) -> Optimizer:
    """The class that `cfg` names, with a group for each rate; the run's own comes first, which is the one logged.

    Args:
        learning, rates: by parameter name.
    """
    grouped: dict[Rate, list[Tensor]] = {}
    for name, parameter in learning.items():
        grouped.setdefault(rates[name], []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": own, "lr": cfg.lr * rate.ratio, "weight_decay": cfg.weight_decay if rate.decays else 0.0}
        for rate, own in sorted(grouped.items(), key=lambda item: (item[0].ratio != 1, item[0]))
    ]
    options = {str(key): tuple(v) if isinstance(v, ListConfig) else v for key, v in cfg.options.items()}
    return get_class(cfg._target_)(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, **options)


def require(cfg: DictConfig) -> None:
    """Refuse, before any work, an optimiser that can't be made.

    Raises:
        ConfigError: there is no such class, or it has no such option.
    """
    try:
        kind = get_class(cfg._target_)
    except Exception as error:  # Hydra raises several kinds
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"optimizer._target_ is {cfg._target_!r}, which can't be imported ({reason}); see conf/optimizer/"
        ) from error
    known = sorted(set(signature(kind).parameters) - {"params", "lr", "weight_decay"})
    for option in cfg.options:
        if option not in known:
            near = ", ".join(get_close_matches(option, known, n=3, cutoff=0.3) or known)
            raise ConfigError(f"optimizer.options has {option!r}, which {cfg._target_} does not take there; near: {near}")


def plus(name: str, ratio: float) -> float:
    """LoRA+ (Hayou et al. 2024): B learns `ratio` times as fast as A."""
    return ratio if any(end in name for end in LORA_B) else 1.0


def build_schedule(cfg: DictConfig, optimizer: Optimizer, steps: int) -> LambdaLR:
    return LambdaLR(optimizer, learning_rate(cfg.schedule, cfg.warmup_steps, steps, cfg.cycles))


def learning_rate(schedule: Schedule, warmup: int, total: int, cycles: int = 1) -> Callable[[int], float]:
    """Share of the peak rate by optimiser step: linear warm-up from 1/warmup, then constant, a line to 0, half a cosine to 0,
    or `cycles` half cosines that each start at the peak."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule is Schedule.constant:
            return 1.0
        done = min((step - warmup) / max(total - warmup, 1), 1.0)
        if schedule is Schedule.linear:
            return 1.0 - done
        turns = cycles if schedule is Schedule.restarts and done < 1 else 1
        return 0.5 + 0.5 * cos(pi * (done * turns % 1 if turns > 1 else done))

    return share
