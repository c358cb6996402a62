"""Quantise the linear layers of a frozen model with one of several libraries, and report the memory."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..config import ConfigError, enums
from ..heap import trim
from ..storage.digests import digest
from . import store, stream

NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes", "diffusers.quantizers.torchao.torchao_quantizer")
FP8_MATMUL = (8, 9)  # lowest CUDA capability with float8 matrix multiplication
BYTES = {  # per weight, scales included
    enums.QuantKind.int8: 1.0,
    enums.QuantKind.fp8: 1.0,
    enums.QuantKind.int8_torchao: 1.0,
    enums.QuantKind.fp8_torchao: 1.0,
    enums.QuantKind.int4: 0.53,
    enums.QuantKind.int2: 0.28,
    enums.QuantKind.int4_torchao: 1.19,
    enums.QuantKind.nf4: 0.57,
}


class Backend(Protocol):
    """One library's quantisation of one layer. Layers are linear, frozen, and already on their device and in their dtype."""

    def quantise(self, layer: nn.Linear) -> nn.Linear:
        """The quantised layer; it may be changed in place or replaced."""

    def pack(self, layer: nn.Linear) -> tuple[dict[str, Tensor], str]:
        """A quantised layer's weight as plain tensors, and a string with what else is needed to restore it."""

    def unpack(self, layer: nn.Linear, parts: Mapping[str, Tensor], spec: str) -> nn.Linear:
        """Restore a quantised weight in a layer on the meta device; its bias is not changed."""


class Quantised(NamedTuple):
    """Summary of one quantised model."""

    kind: enums.QuantKind
    layers: int  # quantised
    left: tuple[str, ...]  # linear layers that were skipped
    parameters: int  # of the whole model
    size: int  # bytes of the whole model
    weights: int  # number of quantised weights
    weights_size: int  # their bytes, scales included
    seconds: float
    cached: bool


class Source(NamedTuple):
    """How a model is loaded."""

    read: Callable[[torch.device], nn.Module]  # whole, on a device, frozen
    on_meta: Callable[[], nn.Module]  # its architecture on the meta device
    files: tuple[Path, ...]  # the weight files
    dtype: torch.dtype
    device: torch.device
    digests: Path | None = None  # folder that caches the files' hashes; None: the quantiser's own
    meta_init: Callable[[], nn.Module] | None = None  # for `stream.read`; None: the model is read whole


class Quantiser:
    """Quantises the configured parts of a model, and records their sizes and times.

    Args:
        kinds: part of the pipeline (unet, text_encoder …) → kind; other parts are not quantised.
        cache: folder of quantised weights, or None: quantise again at each start.
    """

    def __init__(self, kinds: Mapping[str, enums.QuantKind], cache: Path | None):
        self.kinds, self.cache = dict(kinds), cache
        self.done: dict[str, Quantised] = {}

    def kind(self, part: str) -> enums.QuantKind:
        return self.kinds.get(part, enums.QuantKind.none)

    def load(self, part: str, source: Source, skip: Sequence[str]) -> nn.Module:
        """Load a part's model, quantised if configured. A cached one is loaded without the full-precision weights.

        Args:
            keeps: components of layer names that are not quantised.
        """
        kind = self.kind(part)
        if kind is enums.QuantKind.none:
            return source.read(source.device)
        check_supported(kind, source.device)
        start, library = time.perf_counter(), backend(kind)
        path = self._path(kind, source, skip)
        model = store.read(path, source.on_meta, library, source.device) if path else None
        cached = model is not None
        if model is None:
            model = _streamed(source, skip, library) or quantise(source.read(torch.device("cpu")), kind, skip, source.device)
            if path:
                store.write(path, model, layers_to_quantize(model, skip)[0], library)
            trim()
        model = model.requires_grad_(False).eval()
        self.done[part] = _summary(model, kind, skip, library, time.perf_counter() - start, cached)
        return model

    def _path(self, kind: enums.QuantKind, source: Source, skip: Sequence[str]) -> Path | None:
        """Path of a model in the cache."""
        if self.cache is None:
            return None
        hashes = {file.name: digest(file, source.digests or self.cache) for file in source.files}
        return store.path(self.cache, kind.value, hashes, str(source.dtype), source.device.type, skip)


def backend(kind: enums.QuantKind) -> Backend:
    """The backend of a kind; imports its library."""
    silence_warnings()
    if kind is enums.QuantKind.nf4:
        from .bnb import NF4

        return NF4()
    bits, _, library = kind.value.partition("_")
    if library == "torchao":
        from .ao import TorchAO

        return TorchAO(bits)
    from .quanto import Quanto

    return Quanto(bits)


def check_supported(kind: enums.QuantKind, device: torch.device) -> None:
    """Check that the device supports a kind, before any weights are read.

    Raises:
        ConfigError: names what the device lacks.
    """
    if kind is enums.QuantKind.fp8_torchao and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_MATMUL:
        has = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ConfigError(
            f"quant.kind is {kind.name}, which needs CUDA capability 8.9; this device has {has}; use quant=fp8 or int8"
        )


def bytes_per_weight(kind: enums.QuantKind) -> float:
    """Bytes per weight of a quantised layer, approximately."""
    return BYTES[kind]


def layers_to_quantize(model: nn.Module, skip: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the linear layers to quantise, and of those to skip."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    left = [name for name in linear if any(_is_skipped(name, keep) for keep in skip)]
    return [name for name in linear if name not in set(left)], left


def _is_skipped(name: str, keep: str) -> bool:
    """Whether a layer is skipped: by a component of its name, or by "re:" and a regular expression of the whole name."""
    return bool(re.fullmatch(keep[3:], name)) if keep.startswith("re:") else keep in name.split(".")


def _streamed(source: Source, skip: Sequence[str], library: Backend) -> nn.Module | None:
    """Quantise while reading, so that the full-precision model is never completely in memory; None if the files don't allow
    it."""
    if source.meta_init is None:
        return None
    model = source.meta_init()
    files = [file for file in source.files if file.suffix == ".safetensors"]
    return stream.read(model, files, source.device, layers_to_quantize(model, skip)[0], library)


def quantise(model: nn.Module, kind: enums.QuantKind, skip: Sequence[str], device: torch.device | None = None) -> nn.Module:
    """Quantise a frozen model in place, one layer at a time, so that two whole copies never exist; returns it.

    Convolutions, norms and embeddings are not quantised: they have few of a denoiser's parameters, and every library can adapt
    them unquantised.

    Args:
        device: each layer is moved there before it is quantised, and the others afterwards; None: no moves.
    """
    library = backend(kind)
    names, _ = layers_to_quantize(model.requires_grad_(False), skip)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, library.quantise(layer.to(device) if device else layer))
    if device:
        _move(model, device)
    return model


def _move(model: nn.Module, device: torch.device) -> None:
    """Move every unquantised tensor to a device."""
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None and parameter.device != device:
                module._parameters[own] = nn.Parameter(parameter.data.to(device), requires_grad=False)
        for own, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[own] = buffer.to(device)


def _summary(
    model: nn.Module, kind: enums.QuantKind, skip: Sequence[str], library: Backend, seconds: float, cached: bool
) -> Quantised:
    names, left = layers_to_quantize(model, skip)
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


def silence_warnings() -> None:
    """Silence these libraries' import warnings about missing kernels that are not used here."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
