"""A content-addressed store of tensors on disk, shared by runs and processes.

A key is the hash of everything its value depends on, so a stale value can't be found. Files appear whole (written aside,
then renamed) and carry a checksum of their tensors, so a damaged one is noticed and made again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "1"  # of what is stored; part of every key


def key(*parts: str) -> str:
    """SHA-256 over parts, in hexadecimal; no two different lists of parts share their bytes."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in (VERSION, *parts)).encode()).hexdigest()


class Store:
    """One kind of value under a cache root.

    Args:
        root: the cache folder, made if absent.
        kind: name of the sub-folder.
    """

    def __init__(self, root: Path, kind: str):
        self.folder = root / kind
        self.damaged = 0
        self.read = lru_cache(maxsize=512)(self._read)  # a subject's whole set stays in memory

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def intact(self, key: str) -> bool:
        """Whether the entry exists and its tensors match their checksum; a damaged one is counted and removed."""
        path = self._path(key)
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get("sha256")
            if said == _checksum(self._read(key)):
                return True
        except (SafetensorError, OSError):
            pass
        self.damaged += 1
        path.unlink(missing_ok=True)
        return False

    def _read(self, key: str) -> dict[str, Tensor]:
        with safe_open(self._path(key), "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(contiguous, aside, metadata={"sha256": _checksum(contiguous)})
            Path(aside).replace(path)
        finally:
            Path(aside).unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
