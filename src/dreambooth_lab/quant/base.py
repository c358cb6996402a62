"""Which layers of a frozen model are kept in fewer bits, by which library, and what that costs."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import ConfigError, QuantKind
from ..digests import digest
from ..heap import trim
from . import store, stream

NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes", "diffusers.quantizers.torchao.torchao_quantizer")
FP8_MATMUL = (8, 9)  # CUDA capability from which the hardware multiplies float8


class Backend(Protocol):
    """One library's way with one layer. Layers are linear, frozen, and already on their device and in their dtype."""

    def quantise(self, layer: nn.Linear) -> nn.Linear:
        """The layer with its weight in fewer bits; may change or replace it."""

    def pack(self, layer: nn.Linear) -> tuple[dict[str, Tensor], str]:
        """A quantised layer's weight as plain tensors, and whatever else restores it, as text."""

    def unpack(self, layer: nn.Linear, parts: Mapping[str, Tensor], spec: str) -> nn.Linear:
        """The same quantised weight in a layer that has no weights yet (on the meta device); its bias is left as it is."""


class Quantised(NamedTuple):
    """What became of one model."""

    kind: QuantKind
    layers: int  # quantised
    left: tuple[str, ...]  # linear layers left alone because the family says so
    parameters: int  # of the whole model
    size: int  # bytes of the whole model
    weights: int  # number of quantised weights
    weights_size: int  # their bytes, scales included
    seconds: float
    cached: bool


class Source(NamedTuple):
    """Where a model comes from."""

    read: Callable[[torch.device], nn.Module]  # whole, on a device, frozen
    hollow: Callable[[], nn.Module]  # its architecture on the meta device
    files: tuple[Path, ...]  # whose bytes decide the weights
    dtype: torch.dtype
    device: torch.device
    digests: Path | None = None  # folder that remembers the files' hashes; None: the quantiser's own
    skeleton: Callable[[], nn.Module] | None = None  # for `stream.read`; None: the model is read whole


class Quantiser:
    """Quantises the parts of a model that the configuration names, and remembers what it cost.

    Args:
        kinds: part of the pipeline (unet, text_encoder …) → kind; parts not named stay as they are.
        cache: folder of quantised weights, or None: quantise anew at each start.
    """

    def __init__(self, kinds: Mapping[str, QuantKind], cache: Path | None):
        self.kinds, self.cache = dict(kinds), cache
        self.done: dict[str, Quantised] = {}

    def kind(self, part: str) -> QuantKind:
        return self.kinds.get(part, QuantKind.none)

    def load(self, part: str, source: Source, keeps: Sequence[str]) -> nn.Module:
        """A part's model, quantised if it is to be: from the cache where it has it, without its full-precision weights.

        Args:
            keeps: components of layer names that are left alone.
        """
        kind = self.kind(part)
        if kind is QuantKind.none:
            return source.read(source.device)
        require(kind, source.device)
        start, library = time.perf_counter(), backend(kind)
        path = self._path(kind, source, keeps)
        model = store.read(path, source.hollow, library, source.device) if path else None
        cached = model is not None
        if model is None:
            model = _streamed(source, keeps, library) or quantise(source.read(torch.device("cpu")), kind, keeps, source.device)
            if path:
                store.write(path, model, chosen(model, keeps)[0], library)
            trim()
        model = model.requires_grad_(False).eval()
        self.done[part] = _account(model, kind, keeps, library, time.perf_counter() - start, cached)
        return model

    def _path(self, kind: QuantKind, source: Source, keeps: Sequence[str]) -> Path | None:
        """Where the cache has a model, or is to have it."""
        if self.cache is None:
            return None
        hashes = {file.name: digest(file, source.digests or self.cache) for file in source.files}
        return store.path(self.cache, kind.value, hashes, str(source.dtype), source.device.type, keeps)


def backend(kind: QuantKind) -> Backend:
    """The library's way for a kind; imports the library."""
    hush()
    if kind is QuantKind.nf4:
        from .bnb import NF4

        return NF4()
    bits, _, library = kind.value.partition("_")
    if library == "torchao":
        from .ao import TorchAO

        return TorchAO(bits)
    from .quanto import Quanto

    return Quanto(bits)


def require(kind: QuantKind, device: torch.device) -> None:
    """Refuse a kind that the device can't do, before any weights are read.

    Raises:
        ConfigError: says what the device lacks.
    """
    if kind is QuantKind.fp8_torchao and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_MATMUL:
        has = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ConfigError(
            f"quant.kind is {kind.name}, which needs CUDA capability 8.9; this device has {has}; use quant=fp8 or int8"
        )


def chosen(model: nn.Module, keeps: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers to quantise, and of those left alone."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    left = [name for name in linear if any(_fits(name, keep) for keep in keeps)]
    return [name for name in linear if name not in set(left)], left


def _fits(name: str, keep: str) -> bool:
    """Whether a layer is one that is left alone: by a component of its name, or by "re:" and an expression of the whole."""
    return bool(re.fullmatch(keep[3:], name)) if keep.startswith("re:") else keep in name.split(".")


def _streamed(source: Source, keeps: Sequence[str], library: Backend) -> nn.Module | None:
    """The quantised model without ever a whole one in full precision, if its files allow it."""
    if source.skeleton is None:
        return None
    model = source.skeleton()
    files = [file for file in source.files if file.suffix == ".safetensors"]
    return stream.read(model, files, source.device, chosen(model, keeps)[0], library)


def quantise(model: nn.Module, kind: QuantKind, keeps: Sequence[str], device: torch.device | None = None) -> nn.Module:
    """Quantise a frozen model in place, one layer at a time, so that never two copies are whole; returns it.

    Convolutions, norms and embeddings stay: they hold few of a denoiser's parameters, and adapters of every library can sit
    on them.

    Args:
        device: where each layer goes before it is quantised, and the others after; None: where the model is.
    """
    library = backend(kind)
    names, _ = chosen(model.requires_grad_(False), keeps)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, library.quantise(layer.to(device) if device else layer))
    if device:
        _move(model, device)
    return model


def _move(model: nn.Module, device: torch.device) -> None:
    """Every plain tensor that is elsewhere."""
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.device != device:
                module._parameters[own] = nn.Parameter(parameter.data.to(device), requires_grad=False)
        for own, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[own] = buffer.to(device)


def _account(
    model: nn.Module, kind: QuantKind, keeps: Sequence[str], library: Backend, seconds: float, cached: bool
) -> Quantised:
    names, left = chosen(model, keeps)
    whole = set(names)
    weights = weights_size = parameters = size = 0
    for name, layer in model.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if name in whole:
            assert isinstance(layer, nn.Linear)
            own.pop("weight")
            weights += layer.in_features * layer.out_features
            weights_size += sum(part.nbytes for part in library.pack(layer)[0].values())
        parameters += sum(p.numel() for p in own.values())
        size += sum(p.nbytes for p in own.values())
    return Quantised(
        kind, len(names), tuple(left), parameters + weights, size + weights_size, weights, weights_size, seconds, cached
    )


def hush() -> None:
    """Keep what these libraries say when imported from the terminal: missing kernels that nothing here calls."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
