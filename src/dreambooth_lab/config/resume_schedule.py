"""What the learning rate's schedule does when a resumed run gets another length."""

from __future__ import annotations

from omegaconf import DictConfig

from . import enums
from .check import ConfigError


def set_schedule_length(saved: DictConfig, now: DictConfig) -> str | None:
    """Decide how long the schedule of a resumed run lasts, in `now`; returns what is to be said of it, if anything.

    A schedule without a length of its own (`optimizer.schedule_steps`) lasts `trainer.max_steps`, so a longer run would change
    rates, and `optimizer.on_extend` says how. A shorter run keeps the schedule it has: it ends before that does.

    Args:
        saved, now: the run's configuration before and from now on.

    Raises:
        ConfigError: it is longer, its schedule falls, and optimizer.on_extend is refuse.
    """
    before, after, cfg = saved.trainer.max_steps, now.trainer.max_steps, now.optimizer
    if before == after or cfg.schedule is enums.Schedule.constant:
        return None
    length, told = cfg.schedule_steps or before, f"trainer.max_steps was {before} and is {after}"
    if after > before and cfg.on_extend is enums.OnExtend.stretch:
        cfg.schedule_steps = None
        return f"{told}: the {cfg.schedule.name} schedule lasts {after} steps instead of {length}, so the rate jumps now"
    if after > before and cfg.on_extend is enums.OnExtend.refuse and cfg.schedule_steps is None:
        raise ConfigError(
            f"{told}, but optimizer.schedule={cfg.schedule.name} falls over {before} steps and optimizer.on_extend is refuse; "
            "set optimizer.on_extend=stretch (the schedule is drawn out over the new length, so the rate jumps up), or "
            "optimizer.on_extend=hold (its last rate stays, which is next to nothing where it falls to 0)"
        )
    cfg.schedule_steps = length
    return f"{told}: the {cfg.schedule.name} schedule lasts {length} steps as before" + (
        ", then its last rate stays" if after > length else ""
    )
