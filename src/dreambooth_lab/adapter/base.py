"""The interface of adapters, and the selection of their layers."""

from __future__ import annotations

import difflib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import REGEX, ConfigError, enums

log = logging.getLogger(__name__)


class Form(NamedTuple):
    """How an export's files are written."""

    name: str  # of the file for ComfyUI and other programs, without its suffix
    dtype: torch.dtype
    formats: tuple[enums.Format, ...]  # those supported by the adapter are written; the card's code loads the first


class ExportWeights(NamedTuple):
    """What an export writes."""

    part: str  # the denoiser's name in a diffusers pipeline
    weights: Mapping[str, Tensor]  # by parameter name, of the denoiser or of `extra_module`
    text: Mapping[str, Mapping[str, Tensor]]  # text encoder's name in the pipeline → its weights
    header: Mapping[str, str]  # goes into the safetensors headers
    kohya: Mapping[str, str]  # part → its prefix in kohya's key layout; empty: programs read diffusers' keys
    form: Form


PURPOSES = ("diffusers", "comfyui", "peft", "lycoris", "weights", "settings")  # possible purposes of an adapter's files


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype, file: str) -> dict[str, Tensor]:
    """Tensors on the CPU in an export's dtype, alphas unchanged; all in float32 if a value doesn't fit, with a log message."""
    kept = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    made = {
        key: (tensor.to(dtype) if tensor.ndim and tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in kept.items()
    }
    lost = next((key for key, tensor in made.items() if not tensor.isfinite().all()), None)
    if lost is None or not kept[lost].isfinite().all():
        return made
    largest = kept[lost].abs().max().item()
    log.warning(
        "%s is written in float32: %s has %.4g, above %s's maximum %.4g; it fits with export.dtype=bfloat16", file, lost, largest,
        str(dtype).removeprefix("torch."), torch.finfo(dtype).max,
    )  # fmt: skip
    return {key: tensor.float().contiguous() for key, tensor in kept.items()}


class Adapter(ABC):
    """An adapter of a frozen denoiser, and of text encoders if they are trained too. Only its parameters are trained.

    Args:
        algorithm: one of the subclass's algorithms.
        rank: r ≥ 1.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout probability of the update's inputs in training.
        parts: groups of layers, by the names of the model family's `target_modules`.
        targets: instead of `parts`: suffixes of layer names, or "re:" and a regular expression that matches whole names.
        text_parts: the same as `parts` for the text encoders.
        blocks: rules for single layers; the first that matches applies: `match` (a regular expression searched in the layer's
            name, prefixed with its text encoder's name if it has one), `rank` or None, `lr_ratio` (factor of the learning rate).
        options: further arguments of the library, under its names.
        preset: LyCORIS only: the name of one of its presets, or a lycoris_config.json.
        rank_schedule, min_rank: how many ranks act at a time; LoRA only.
    """

    model: nn.Module
    unread: Collection[str] = ()  # programs that can't read this adapter's files, though they read LoRAs
    kind: ClassVar[str] = "lora"  # ModelSpec's kind of the file; "" for a whole model

    def __init__(
        self, rank: int, alpha: float, dropout: float, parts: Sequence[str], targets: Sequence[str], algorithm: str = "lora",
        blocks: Sequence[Any] = (), options: Mapping[str, Any] | None = None, preset: str | None = None,
        text_parts: Sequence[str] = (), rank_schedule: enums.RankSchedule = enums.RankSchedule.none, min_rank: int | None = None,
    ):  # fmt: skip
        self.rank_schedule, self.min_rank = rank_schedule, min_rank
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.parts, self.targets, self.algorithm = list(parts), list(targets), algorithm
        self.blocks, self.options, self.preset, self.text_parts = list(blocks), dict(options or {}), preset, list(text_parts)

    @abstractmethod
    def attach(self, model: nn.Module, target_modules: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        """Add new float32 adapters (update 0) to a frozen model; returns the names of the adapted layers.

        Raises:
            ConfigError: a target matches no layer, or an option is unknown.
        """

    def attach_text(self, part: str, encoder: nn.Module, target_modules: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        """The same for the text encoder `part` of a pipeline; the returned names begin with `part`."""
        raise ConfigError(f"adapter.text_encoders is set, but {self.algorithm} does not support text encoders; use lora or dora")

    def follow_time(self, model: nn.Module, time_of: Callable[[Tensor], Tensor]) -> None:  # noqa: B027 most know no time
        """Let the layers of a denoiser act by its time, if `rank_schedule` says so.

        Args:
            time_of: the t of a timestep that the denoiser is called with.
        """

    @abstractmethod
    def load_weights(self, path: Path) -> None:
        """Load the weights of an export, a folder or a file.

        Raises:
            ConfigError: its weights are not those of this adapter.
        """

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """A context in which the model is exactly the base model."""

    def squared_update(self) -> Tensor:
        """‖ΔW‖², the squared distance of all adapted weights from the base model's, differentiable.

        Raises:
            ConfigError: this adapter does not have it.
        """
        raise ConfigError(f"prior.kind is weights, but {self.algorithm} has no ‖ΔW‖² at hand; use adapter=lora or adapter=full")

    @abstractmethod
    def export(self, folder: Path, weights_to_export: ExportWeights) -> dict[Path, str]:
        """Write the files that other programs load; returns each file or folder, relative to `folder`, and its purpose: one of
        `PURPOSES`."""

    @abstractmethod
    def copies(self, formats: Collection[enums.Format]) -> int:
        """Number of files of an export that hold all trained weights."""

    @abstractmethod
    def usage(self, part: str, form: Form, kohya: Mapping[str, str]) -> str:
        """Code that loads the export in the folder `export` into a diffusers `pipeline` of the base model."""

    def load_into(self, pipeline: Any, part: str, path: Path, target_modules: Mapping[str, tuple[str, ...]]) -> None:
        """Load an export of this adapter into a diffusers pipeline."""
        self.attach(getattr(pipeline, part), target_modules, 0)
        self.load_weights(path)

    @abstractmethod
    def set_scale(self, pipeline: Any, strength: float) -> None:
        """Scale the update of an adapter loaded by `load_into`: 0 is the base model, 1 the trained one."""

    def weakened(self, model: nn.Module, strength: float) -> AbstractContextManager[None]:
        """A context in which the update of an attached or loaded adapter is scaled, as by `set_scale`.

        Raises:
            ConfigError: this adapter has no strength while it trains.
        """
        raise ConfigError(f"validation.personal_guidance is set, but {self.algorithm} has no strength to be set; use null")

    def extra_module(self) -> nn.Module | None:
        """The module that holds the adapter's parameters, or None if they are in the model itself."""
        return None

    def layers_of(self, model: nn.Module, target_modules: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Names of the layers that `parts` or `targets` select."""
        return matching_layers(model, self.targets or target_suffixes(self.parts, target_modules, "adapter.parts"))

    @abstractmethod
    def layer_of(self, parameter: str) -> str:
        """Name of the layer that a parameter of the model or of `extra_module` belongs to."""

    def rule(self, layer: str) -> Any:
        """The first of `blocks` that matches a layer's name, or None."""
        return next((block for block in self.blocks if re.search(block["match"], layer)), None)

    def lr_ratio(self, parameter: str, part: str = "") -> float:
        """Factor of a parameter's learning rate, by its layer's rule.

        Args:
            part: name of the text encoder, or "" for the denoiser.
        """
        rule = self.rule(full_name(part, self.layer_of(parameter)))
        return rule["lr_ratio"] if rule else 1.0

    def check_unused_rules(self, layers: Sequence[str]) -> None:
        """Raise a ConfigError for a rule of `blocks` that applies to no layer: none matches, or earlier rules do."""
        applied = [self.rule(layer) for layer in layers]
        for block in self.blocks:
            if not any(rule is block for rule in applied):
                some = ", ".join(layers[:: max(len(layers) // 3, 1)][:3])
                raise ConfigError(
                    f"adapter.blocks has match {block['match']!r}, which applies to no adapted layer, such as {some}"
                )

    def ranks(self, layers: Sequence[str], part: str = "") -> dict[str, int]:
        """Layer → rank, for the layers whose rule sets one."""
        rules = {layer: self.rule(full_name(part, layer)) for layer in layers}
        return {layer: rule["rank"] for layer, rule in rules.items() if rule and rule["rank"]}


def full_name(part: str, layer: str) -> str:
    """A layer's name as the rules match it: prefixed with its text encoder's name, if it has one."""
    return f"{part}.{layer}" if part else layer


def target_suffixes(parts: Sequence[str], target_modules: Mapping[str, tuple[str, ...]], key: str) -> list[str]:
    """The layer name suffixes of these groups.

    Raises:
        ConfigError: the family has no such group.
    """
    if unknown := [part for part in parts if part not in target_modules]:
        raise ConfigError(f"{key} has {unknown}; set {key} to some of {sorted(target_modules)}, the groups that this model has")
    return [ending for part in parts for ending in target_modules[part]]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ConfigError: the file does not exist or is not a safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"adapter.init_from is {str(path)!r}, which can't be read: {error}") from error


@contextmanager
def temporarily_replaced(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which the parameters have other values; nothing is copied if both are on one device."""
    before = {name: parameters[name].data for name in weights}
    for name, weight in weights.items():
        parameters[name].data = weight.detach().to(before[name].device, before[name].dtype)
    try:
        yield
    finally:
        for name, data in before.items():
            parameters[name].data = data


def matching_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear and convolution layers that match any of `targets`: a suffix of whole components, or "re:" and a
    regular expression of the whole name.

    Raises:
        ConfigError: a target matches no layer; names similar ones.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    hits = {target: _matches(names, target) for target in targets}
    for target, found in hits.items():
        if not found:
            tails = sorted({".".join(name.split(".")[-target.count(".") - 1 :]) for name in names})
            near = difflib.get_close_matches(target, tails, n=3, cutoff=0.3) or tails[:8]
            raise ConfigError(f"adapter target {target!r} matches no layer of the model; similar: {', '.join(near)}")
    return sorted({name for found in hits.values() for name in found})


def _matches(names: Sequence[str], target: str) -> list[str]:
    if not target.startswith(REGEX):
        return [name for name in names if name == target or name.endswith("." + target)]
    pattern = re.compile(target.removeprefix(REGEX))
    return [name for name in names if pattern.fullmatch(name)]


def refuse_unknown(options: Mapping[str, Any], known: Sequence[str], who: str) -> None:
    """Raise a ConfigError for options that a library does not have."""
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=3, cutoff=0.3)
            raise ConfigError(f"adapter.options has {option!r}, which {who} does not know; similar: {', '.join(near) or 'none'}")
