"""Quantised weights on disk: later starts don't read the full-precision ones.

A file's name is the hash of everything its content depends on, including the full-precision weights' hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..storage.durable import atomic_file

if TYPE_CHECKING:
    from .base import Backend

log = logging.getLogger(__name__)

VERSION = "1"  # of the format; part of every name
LIBRARIES = ("torch", "optimum-quanto", "torchao", "bitsandbytes")
BETWEEN = "::"  # layer name :: part of its weight


def path(cache: Path, kind: str, files: Mapping[str, str], dtype: str, device: str, skip: Sequence[str]) -> Path:
    """The file of a model's quantised weights.

    Args:
        files: name → hash, of the files with the full-precision weights.
    """
    digests = [f"{name} {value}" for name, value in files.items()]
    words = [VERSION, kind, dtype, device, *sorted(skip), *digests, *map(_version, LIBRARIES)]
    name = hashlib.sha256("\0".join(words).encode()).hexdigest()
    return cache / f"{kind}-{name[:32]}.safetensors"


def _version(library: str) -> str:
    try:
        return f"{library} {metadata.version(library)}"
    except metadata.PackageNotFoundError:
        return library


def write(path: Path, model: nn.Module, layers: Sequence[str], library: Backend) -> None:
    """Every tensor of a model, quantised layers in parts, tied ones once; the file is written atomically."""
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}  # for tied parameters and buffers: the name under which their tensor is written
    tied: dict[str, str] = {}  # the other names → that one
    specs: dict[str, str] = {}
    quantised = set(layers)
    for name, module in model.named_modules():
        if name in quantised:
            assert isinstance(module, nn.Linear)
            parts, specs[name] = library.pack(module)
            tensors |= {f"{name}{BETWEEN}{part}": tensor for part, tensor in parts.items()}
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name not in quantised or own == "bias":
                key = f"{name}.{own}".lstrip(".")
                if (known := first.setdefault(id(tensor), key)) == key:
                    tensors[key] = tensor
                else:
                    tied[key] = known
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as aside:
        save_file(plain, aside, metadata={"specs": json.dumps(specs), "tied": json.dumps(tied)})


def read(path: Path, on_meta: Callable[[], nn.Module], library: Backend, device: torch.device) -> nn.Module | None:
    """Read the model of `write`; None if there is no file, or if it was damaged and removed."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            specs, tied = (json.loads(file.metadata().get(name, "{}")) for name in ("specs", "tied"))
            model = on_meta()
            for key in file.keys():  # noqa: SIM118
                if BETWEEN not in key:
                    same = [name for name, known in tied.items() if known == key]
                    _put(model, [key, *same], file.get_tensor(key).clone())  # a mapped tensor is not aligned
            names = [key.split(BETWEEN) for key in file.keys() if BETWEEN in key]  # noqa: SIM118
            for layer, spec in specs.items():
                parts = {part: file.get_tensor(layer + BETWEEN + part).clone() for name, part in names if name == layer}
                meta = model.get_submodule(layer)
                assert isinstance(meta, nn.Linear)
                model.set_submodule(layer, library.unpack(meta, parts, spec))
            return model
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        log.warning("quantised weights in %s are damaged (%s); quantising again", path, error)
        path.unlink(missing_ok=True)
        return None


def _put(model: nn.Module, keys: Sequence[str], tensor: Tensor) -> None:
    """Set the parameter or buffer that all these names share."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for key in keys:
        where, _, own = key.rpartition(".")
        module = model.get_submodule(where)
        if own in module._parameters:
            module._parameters[own] = parameter
        else:
            module._buffers[own] = tensor
