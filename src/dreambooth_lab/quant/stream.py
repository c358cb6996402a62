"""Quantise a model while reading its files: each layer is quantised as soon as its tensors are read, so that the
full-precision model is never complete, neither in memory nor on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..heap import trim

if TYPE_CHECKING:
    from .base import Backend

# Bytes read until a file is reopened and freed memory is returned: until then read parts of a mapped file count as memory,
# and the C library holds the memory of replaced layers.
PIECE = 64 * 2**20


class Parameters:
    """The parameters of a model without weights, to be filled with tensors.

    Args:
        model: parameters on the meta device, with their final dtypes; buffers that are in no file are real.
    """

    def __init__(self, model: nn.Module):
        self.model, self.wanted = model, model.state_dict(keep_vars=True)
        self.tied: dict[int, list[str]] = {}  # names of one tensor; files contain at least one of them
        for name, tensor in self.wanted.items():
            self.tied.setdefault(id(tensor), []).append(name)

    def fit(self, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether files with these tensors contain this model, each tensor under its own name."""
        same = all(name in self.wanted and tuple(shape) == tuple(self.wanted[name].shape) for name, shape in shapes.items())
        return same and all(any(name in shapes for name in names) for names in self.tied.values())

    def put(self, name: str, tensor: Tensor, device: torch.device) -> list[str]:
        """Set a tensor under its name and all tied names; returns them."""
        wanted = self.wanted[name]
        placed = tensor.to(device, wanted.dtype, copy=True)  # a mapped tensor is not aligned
        if isinstance(wanted, nn.Parameter):
            placed = nn.Parameter(placed, requires_grad=False)
        for each in self.tied[id(wanted)]:
            module, own = _owner(self.model, each)
            kind: dict[str, Any] = module._parameters if own in module._parameters else module._buffers
            kind[own] = placed
        return self.tied[id(wanted)]


def read(
    model: nn.Module, files: Sequence[Path], device: torch.device, layers: Sequence[str], library: Backend
) -> nn.Module | None:
    """The model with its weights, some layers quantised; None: the files don't contain it under its own names.

    Args:
        model: without weights, see `Parameters`.
        files: the safetensors files that contain it.
        layers: linear ones to quantise.
    """
    places = Parameters(model)
    if not places.fit(_shapes(files)):
        return None
    lacking = {layer: set(dict(model.get_submodule(layer).named_parameters(recurse=False))) for layer in layers}
    done: set[str] = set()
    for name, tensor in _tensors(files):
        if name in done:  # tied to an earlier one
            continue
        done.update(placed := places.put(name, tensor, device))
        for layer, _, own in (each.rpartition(".") for each in placed):
            if own in lacking.get(layer, ()):
                lacking[layer].remove(own)
                if not lacking[layer]:
                    _quantise(model, layer, library)
    _move_rest(model, device)
    return model


def _quantise(model: nn.Module, name: str, library: Backend) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    model.set_submodule(name, library.quantise(layer))


def _move_rest(model: nn.Module, device: torch.device) -> None:
    """Buffers that are in no file."""
    for module in model.modules():
        for own, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[own] = buffer.to(device)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    where, _, own = name.rpartition(".")
    return model.get_submodule(where), own


def _shapes(files: Sequence[Path]) -> dict[str, Sequence[int]]:
    shapes: dict[str, Sequence[int]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, in the order of the files' bytes."""
    for path in files:
        with safe_open(path, "pt") as file:
            names = list(file.offset_keys())
        while names:
            size = 0
            with safe_open(path, "pt") as file:
                while names and size < PIECE:
                    name = names.pop(0)
                    tensor = file.get_tensor(name)
                    size += tensor.nbytes
                    yield name, tensor
                    del tensor
            trim(collect=False)
