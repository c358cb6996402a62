"""Quantised weights on disk: the second start neither reads nor holds the full-precision ones.

A file's name is the hash of all that its content depends on, the full-precision weights' own hash included.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import Backend

log = logging.getLogger(__name__)

VERSION = "1"  # of the format; part of every name
LIBRARIES = ("torch", "optimum-quanto", "torchao", "bitsandbytes")
BETWEEN = "::"  # layer name :: part of its weight


def path(cache: Path, kind: str, files: Mapping[str, str], dtype: str, device: str, keeps: Sequence[str]) -> Path:
    """Where a model's quantised weights belong.

    Args:
        files: name → hash, of those that decide the full-precision weights.
    """
    digests = [f"{name} {value}" for name, value in files.items()]
    words = [VERSION, kind, dtype, device, *sorted(keeps), *digests, *map(_version, LIBRARIES)]
    name = hashlib.sha256("\0".join(words).encode()).hexdigest()
    return cache / f"{kind}-{name[:32]}.safetensors"


def _version(library: str) -> str:
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return library


def write(path: Path, model: nn.Module, layers: Sequence[str], library: Backend) -> None:
    """Every tensor of a model, quantised layers in parts; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    specs: dict[str, str] = {}
    quantised = set(layers)
    for name, module in model.named_modules():
        if name in quantised:
            assert isinstance(module, nn.Linear)
            parts, specs[name] = library.pack(module)
            tensors |= {f"{name}{BETWEEN}{part}": tensor for part, tensor in parts.items()}
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name not in quantised or own == "bias":
                tensors[f"{name}.{own}".lstrip(".")] = tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, aside, metadata={"specs": json.dumps(specs)})
        Path(aside).replace(path)
    finally:
        Path(aside).unlink(missing_ok=True)


def read(path: Path, hollow: Callable[[], nn.Module], library: Backend, device: torch.device) -> nn.Module | None:
    """The model that `write` was given, or None: there is no such file, or it is damaged and was removed."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            specs = json.loads(file.metadata()["specs"])
            model = hollow()
            for key in file.keys():  # noqa: SIM118
                if BETWEEN not in key:
                    _put(model, key, file.get_tensor(key).clone())  # a mapped tensor is not aligned
            names = [key.split(BETWEEN) for key in file.keys() if BETWEEN in key]  # noqa: SIM118
            for layer, spec in specs.items():
                parts = {part: file.get_tensor(layer + BETWEEN + part).clone() for name, part in names if name == layer}
                meta = model.get_submodule(layer)
                assert isinstance(meta, nn.Linear)
                model.set_submodule(layer, library.unpack(meta, parts, spec))
            return model
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        log.warning("quantised weights in %s are damaged (%s); made again", path, error)
        path.unlink(missing_ok=True)
        return None


def _put(model: nn.Module, key: str, tensor: Tensor) -> None:
    where, _, own = key.rpartition(".")
    module = model.get_submodule(where)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[own] = tensor
