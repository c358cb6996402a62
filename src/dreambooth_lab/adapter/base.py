"""What every adapter can do, and which layers it sits on."""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import REGEX, ConfigError


class Learned(NamedTuple):
    """What an export writes."""

    part: str  # the denoiser's name in a diffusers pipeline
    weights: Mapping[str, Tensor]  # by parameter name, of the denoiser or of `outside`
    text: Mapping[str, Mapping[str, Tensor]]  # text encoder's name in the pipeline → its own
    header: Mapping[str, str]  # goes into the safetensors headers
    kohya: Mapping[str, str]  # part → what kohya's key layout calls it


class Adapter(ABC):
    """Attached once to a frozen denoiser, and to text encoders if they learn too; its parameters are the only ones that learn.

    Args:
        algorithm: one of the class's own.
        rank: r ≥ 1.
        alpha: the update is scaled by alpha / rank.
        dropout: share of the update's inputs dropped in training.
        parts: groups of layers that the model family names.
        targets: instead of `parts`: endings of layer names, or "re:" and a regular expression of whole names.
        text_parts: groups of the text encoders' layers that the model family names.
        blocks: rules for some layers, the first that fits counts: `match` (regular expression found in the layer's name, which
            begins with the encoder's if it is a text encoder's), `rank` or None, `lr_ratio` (learning rate over the run's).
        options: of the library, as it spells them.
        preset: LyCORIS only: name of one of its presets, or a lycoris_config.json.
    """

    model: nn.Module
    usage: ClassVar[str]  # code that loads the folder `export` with diffusers or the adapter's library, {base} and {part} put in

    def __init__(
        self, rank: int, alpha: float, dropout: float, parts: Sequence[str], targets: Sequence[str], algorithm: str = "lora",
        blocks: Sequence[Any] = (), options: Mapping[str, Any] | None = None, preset: str | None = None,
        text_parts: Sequence[str] = (),
    ):  # fmt: skip
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.parts, self.targets, self.algorithm = list(parts), list(targets), algorithm
        self.blocks, self.options, self.preset, self.text_parts = list(blocks), dict(options or {}), preset, list(text_parts)

    @abstractmethod
    def attach(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        """Put fresh float32 adapters (update 0) on a frozen model; returns the names of the layers that got one.

        Raises:
            ConfigError: a target matches no layer, or an option is unknown.
        """

    def attach_text(self, part: str, encoder: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        """The same for a text encoder, `part` in a pipeline; the names begin with it."""
        raise ConfigError(f"adapter.text_encoders is set, but {self.algorithm} can't sit on text encoders; use lora or dora")

    @abstractmethod
    def take(self, path: Path) -> None:
        """Go on from an export of this adapter, a folder or a file.

        Raises:
            ConfigError: it holds other weights than these.
        """

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Inside, the model is exactly the base model; after, adapters are as they were."""

    @abstractmethod
    def export(self, folder: Path, learned: Learned) -> list[Path]:
        """Write what other tools load; returns the files."""

    def load_into(self, pipeline: Any, part: str, path: Path, learns: Mapping[str, tuple[str, ...]]) -> None:
        """Put an export of this adapter into a diffusers pipeline."""
        self.attach(getattr(pipeline, part), learns, 0)
        self.take(path)

    @abstractmethod
    def strengthen(self, pipeline: Any, strength: float) -> None:
        """Scale the update of an adapter that `load_into` placed; 0 is the base model, 1 what was trained."""

    def outside(self) -> nn.Module | None:
        """Holds the parameters that are not the model's own; None when all are."""
        return None

    def layers_of(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Names of the layers that `parts` or `targets` choose."""
        return match(model, self.targets or endings(self.parts, learns, "adapter.parts"))

    @abstractmethod
    def layer_of(self, parameter: str) -> str:
        """Name of the layer that a parameter, of the model or of `outside`, belongs to."""

    def rule(self, layer: str) -> Any:
        """The first of `blocks` that fits a layer's name, or None."""
        return next((block for block in self.blocks if re.search(block["match"], layer)), None)

    def lr_ratio(self, parameter: str, part: str = "") -> float:
        """Learning rate of a parameter over the run's, by its layer's rule.

        Args:
            part: of the pipeline, if it is a text encoder's.
        """
        rule = self.rule(named(part, self.layer_of(parameter)))
        return rule["lr_ratio"] if rule else 1.0

    def refuse_idle_rules(self, layers: Sequence[str]) -> None:
        """Raise a ConfigError for a rule of `blocks` that fits no adapted layer, or only layers that an earlier one took."""
        took = [self.rule(layer) for layer in layers]
        for block in self.blocks:
            if not any(rule is block for rule in took):
                some = ", ".join(layers[:: max(len(layers) // 3, 1)][:3])
                raise ConfigError(
                    f"adapter.blocks has match {block['match']!r}, which decides for no adapted layer, such as {some}"
                )

    def ranks(self, layers: Sequence[str], part: str = "") -> dict[str, int]:
        """Layer → rank, for those whose rule gives one."""
        rules = {layer: self.rule(named(part, layer)) for layer in layers}
        return {layer: rule["rank"] for layer, rule in rules.items() if rule and rule["rank"]}


def named(part: str, layer: str) -> str:
    """A layer's name as rules see it: after its text encoder's, if it is one's."""
    return f"{part}.{layer}" if part else layer


def endings(parts: Sequence[str], learns: Mapping[str, tuple[str, ...]], key: str) -> list[str]:
    """Endings of the layer names of some groups.

    Raises:
        ConfigError: a group the family doesn't name.
    """
    if strangers := [part for part in parts if part not in learns]:
        raise ConfigError(f"{key} has {strangers}; this model family names {sorted(learns)}")
    return [ending for part in parts for ending in learns[part]]


def read_weights(path: Path) -> dict[str, Tensor]:
    """What `adapter.init_from`, or an export, holds.

    Raises:
        ConfigError: there is no such file, or it is no safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"adapter.init_from is {str(path)!r}, which can't be read: {error}") from error


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
    pattern = re.compile(target.removeprefix(REGEX))
    return [name for name in names if pattern.fullmatch(name)]


def refuse_unknown(options: Mapping[str, Any], known: Sequence[str], who: str) -> None:
    """Raise a ConfigError for options that a library does not have."""
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=3, cutoff=0.3)
            raise ConfigError(f"adapter.options has {option!r}, which {who} does not know; near: {', '.join(near) or 'none'}")
