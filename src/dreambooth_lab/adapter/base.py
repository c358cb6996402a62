"""What every adapter can do, and which layers it sits on."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import ConfigError

REGEX = "re:"  # begins a target that is a regular expression


class Adapter(ABC):
    """Attached once to a frozen model; its parameters are the only ones that learn.

    Args:
        algorithm: one of the class's own.
        rank: r ≥ 1.
        alpha: the update is scaled by alpha / rank.
        dropout: share of the update's inputs dropped in training.
        parts: groups of layers that the model family names.
        targets: instead of `parts`: endings of layer names, or "re:" and a regular expression of whole names.
        blocks: rules for some layers, the first that fits counts: `match` (regular expression found in the name), `rank`
            or None, `lr_ratio` (learning rate over the run's).
        init_from: a file of this adapter's own export to start from, or None.
        options: of the library, as it spells them.
        preset: LyCORIS only: name of one of its presets, or a lycoris_config.json.
    """

    model: nn.Module

    def __init__(
        self, rank: int, alpha: float, dropout: float, parts: Sequence[str], targets: Sequence[str], algorithm: str = "lora",
        blocks: Sequence[Any] = (), init_from: str | None = None, options: Mapping[str, Any] | None = None,
        preset: str | None = None,
    ):  # fmt: skip
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.parts, self.targets, self.algorithm = list(parts), list(targets), algorithm
        self.blocks, self.init_from, self.options, self.preset = list(blocks), init_from, dict(options or {}), preset

    @abstractmethod
    def attach(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        """Put fresh float32 adapters (update 0) on a frozen model; returns the names of the layers that got one.

        Raises:
            ConfigError: a target matches no layer, or an option is unknown.
        """

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Inside, the model is exactly the base model; after, adapters are as they were."""

    @abstractmethod
    def export(self, folder: Path, weights: Mapping[str, Tensor], part: str, header: Mapping[str, str]) -> list[Path]:
        """Write what other tools load; returns the files.

        Args:
            weights: by parameter name, of the model or of `outside`.
            part: the denoiser's name in a diffusers pipeline.
            header: goes into the safetensors headers.
        """

    def load_into(self, pipeline: Any, part: str, folder: Path, learns: Mapping[str, tuple[str, ...]]) -> None:
        """Put an export of this adapter into a diffusers pipeline."""
        self.init_from = str(folder)
        self.attach(getattr(pipeline, part), learns, 0)

    @abstractmethod
    def strengthen(self, pipeline: Any, strength: float) -> None:
        """Scale the update of an adapter that `load_into` placed; 0 is the base model, 1 what was trained."""

    def outside(self) -> nn.Module | None:
        """Holds the parameters that are not the model's own; None when all are."""
        return None

    def layers_of(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Names of the layers that `parts` or `targets` choose."""
        strangers = [part for part in self.parts if part not in learns]
        if strangers and not self.targets:
            raise ConfigError(f"adapter.parts has {strangers}; this model family names {sorted(learns)}")
        return match(model, self.targets or [ending for part in self.parts for ending in learns[part]])

    def rule(self, layer: str) -> Any:
        """The first of `blocks` that fits a layer or parameter name, or None."""
        return next((block for block in self.blocks if re.search(block["match"], layer)), None)

    def lr_ratio(self, parameter: str) -> float:
        rule = self.rule(parameter)
        return rule["lr_ratio"] if rule else 1.0

    def ranks(self, layers: Sequence[str]) -> dict[str, int]:
        """Layer → rank, for those whose rule gives one."""
        rules = {layer: self.rule(layer) for layer in layers}
        return {layer: rule["rank"] for layer, rule in rules.items() if rule and rule["rank"]}


@contextmanager
def swapped(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold other values; no bytes are copied on one device."""
    before = {name: parameters[name].data for name in weights}
    for name, weight in weights.items():
        parameters[name].data = weight.detach().to(before[name].device, before[name].dtype)
    try:
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data


def match(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear and convolution layers that fit any of `targets`: an ending of whole components, or "re:" and a
    regular expression of the whole name.

    Raises:
        ConfigError: a target matches nothing; names the nearest layers.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hits = {target: _fitting(names, target) for target in targets}
    for target, found in hits.items():
        if not found:
            tails = sorted({".".join(name.split(".")[-target.count(".") - 1 :]) for name in names})
            near = difflib.get_close_matches(target, tails, n=3, cutoff=0.3) or tails[:8]
            raise ConfigError(f"adapter target {target!r} matches no layer of the model; near: {', '.join(near)}")
    return sorted({name for found in hits.values() for name in found})


def _fitting(names: Sequence[str], target: str) -> list[str]:
    if not target.startswith(REGEX):
        return [name for name in names if name == target or name.endswith("." + target)]
    try:
        pattern = re.compile(target.removeprefix(REGEX))
    except re.error as error:
        raise ConfigError(f"adapter target {target!r} is no regular expression: {error}") from error
    return [name for name in names if pattern.fullmatch(name)]


def refuse_unknown(options: Mapping[str, Any], known: Sequence[str], who: str) -> None:
    """Raise a ConfigError for options that a library does not have."""
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=3, cutoff=0.3)
            raise ConfigError(f"adapter.options has {option!r}, which {who} does not know; near: {', '.join(near) or 'none'}")
