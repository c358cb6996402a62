"""`memory=…`: the first of the group's plans with which a run fits the card, as command-line overrides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from rich.table import Table

from .. import terminal
from ..config import ConfigError
from .cached_counts import CachedCounts
from .phases import Forecast, Need

log = logging.getLogger(__name__)

GIB = 2**30
BATCH = ("dataset.batch_size", "trainer.accumulate_grad_batches")  # setting one of them on the command line fixes both
Compose = Callable[[Sequence[str]], DictConfig]  # the run's configuration with further overrides


class Chosen(NamedTuple):
    """The configuration to run, and its memory."""

    cfg: DictConfig
    words: list[str]  # the plan's overrides
    needs: list[Need]
    card: int  # bytes

    @property
    def fits(self) -> bool:
        return max(need.least_card for need in self.needs) <= self.card

    def show(self) -> None:
        """Print it, and the equivalent overrides."""
        terminal.show(self.table())
        if self.words:
            log.info("memory: chosen for this card: %s", " ".join(self.words))
        elif not self.fits:
            log.warning("this run may not fit the device; memory=auto looks for a plan that does")

    def table(self) -> Table:
        """The memory of each phase, compared with the card's."""
        title = f"Device memory by phase, estimated before loading weights; the device has {self.card / GIB:.1f} GiB"
        table = Table("phase", "what for", "GiB", "", title=title, title_justify="left", title_style="bold")
        for need in self.needs:
            parts = ", ".join(f"{what} {size / GIB:.2f}" for what, size in need.parts.items())
            fits = "fits" if need.least_card <= self.card else f"needs a card of {need.least_card / GIB:.1f}"
            table.add_row(need.phase, parts, f"{need.total / GIB:.2f}", fits)
        return table


def choose_plan(cfg: DictConfig, lines: Sequence[str], compose: Compose) -> Chosen | None:
    """The configuration to run, by `cfg.memory`; None: there is neither a card nor a plan.

    Args:
        cfg: the user's configuration, checked.
        said: the user's own overrides, which take precedence.
        compose: composes the same configuration with further overrides.

    Raises:
        ConfigError: no plan fits.
    """
    card = _card(cfg)
    if card is None:
        if cfg.memory.plans:
            raise ConfigError("memory is auto, but there is no GPU; set a size, such as memory=12gb, or memory=none")
        return None
    known = CachedCounts(Path(cfg.cache).expanduser() / "fitting")
    own = {word.lstrip("+~").partition("=")[0] for word in lines}
    best: Chosen | None = None
    for plan in cfg.memory.plans or [[]]:
        words = _left(plan, own, _rows(cfg))
        try:
            tried = compose(words) if words else cfg
        except ConfigError:  # the user's overrides conflict with this plan
            continue
        needs = _forecast(tried, known)
        if needs is None:
            return None
        best = Chosen(tried, words, needs, card)
        if best.fits:
            return best
    assert best is not None
    if cfg.memory.plans:
        raise ConfigError(_too_large(best))
    return best


def _forecast(cfg: DictConfig, known: CachedCounts) -> list[Need] | None:
    """The phases; None: they can't be estimated for this model, and no plan is requested.

    Raises:
        ConfigError: they can't be estimated, and a plan is requested.
    """
    try:
        return Forecast(cfg, known).phases()
    except Exception as error:  # torch and the libraries raise several kinds for operations without fake tensors
        if isinstance(error, ConfigError) and error.__cause__ is None:  # its message is complete
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        prefix = f"the memory of this run can't be estimated without its weights ({reason})"
        if cfg.memory.plans:
            raise ConfigError(
                f"{prefix}; set memory=none, and choose the memory-saving options yourself: see conf/memory/auto.yaml"
            ) from error
        log.warning("%s; the preflight shows the memory of a training step after loading them", prefix)
        return None


def _card(cfg: DictConfig) -> int | None:
    """Available bytes: of the given card size, or of the GPU that will be used."""
    if cfg.memory.card_gib is not None:
        return int(cfg.memory.card_gib * GIB)
    if cfg.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _rows(cfg: DictConfig) -> int:
    """Rows of an optimiser step on one device, by the user's configuration."""
    return int(cfg.dataset.batch_size * cfg.trainer.accumulate_grad_batches)


def _left(plan: Sequence[str], own: set[str], rows: int) -> list[str]:
    """A plan's overrides, except those whose key, or a key inside it, the user has set."""
    own = own | set(BATCH) if own & set(BATCH) else own
    keyed = [(word.partition("=")[0], word.format(rows=rows)) for word in plan]
    return [word for key, word in keyed if not any(text == key or text.startswith(f"{key}.") for text in own)]


def _too_large(best: Chosen) -> str:
    worst = max(best.needs, key=lambda need: need.least_card)
    even = f" even with {' '.join(best.words)}" if best.words else ""
    return (
        f"memory: {worst.phase} needs a card of {worst.least_card / GIB:.1f} GiB{even}, and this one has {best.card / GIB:.1f}; "
        "set a lower model.resolution, a smaller adapter.rank or another model, or memory=none to try anyway"
    )
