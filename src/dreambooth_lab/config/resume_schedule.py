"""What the learning rate's schedule does when a resumed run gets another length."""

from __future__ import annotations

from omegaconf import DictConfig

from . import enums
from .check import ConfigError


def set_schedule_length(saved: DictConfig, now: DictConfig) -> str | None:
    """Set the length of a resumed run's schedule in `now`; returns a notice, if any.

    A schedule without its own length (`optimizer.schedule_steps`) lasts `trainer.max_steps`, so a longer run would change
    learning rates; `optimizer.on_extend` decides how. A shorter run keeps its schedule and ends before it.

    Args:
        saved, now: the run's saved and new configuration.

    Raises:
        ConfigError: the run is longer, its schedule decays, and optimizer.on_extend is refuse.
    """
    before, after, cfg = saved.trainer.max_steps, now.trainer.max_steps, now.optimizer
    if before == after or cfg.schedule is enums.Schedule.constant:
        return None
    length, prefix = cfg.schedule_steps or before, f"trainer.max_steps was {before} and is {after}"
    if after > before and cfg.on_extend is enums.OnExtend.stretch:
        cfg.schedule_steps = None
        return (
            f"{prefix}: the {cfg.schedule.name} schedule lasts {after} steps instead of {length}, so the learning rate jumps now"
        )
    if after > before and cfg.on_extend is enums.OnExtend.refuse and cfg.schedule_steps is None:
        raise ConfigError(
            f"{prefix}, but optimizer.schedule={cfg.schedule.name} decays over {before} steps and optimizer.on_extend is refuse; "
            "set optimizer.on_extend=stretch (decay over the new length, so the learning rate jumps up), or "
            "optimizer.on_extend=hold (keep the last learning rate, which is almost 0 if it decays to 0)"
        )
    cfg.schedule_steps = length
    return f"{prefix}: the {cfg.schedule.name} schedule lasts {length} steps as before" + (
        ", then the last learning rate is kept" if after > length else ""
    )
