"""A content-addressed store of tensors on disk, shared by runs and processes.

A key is the hash of everything its value depends on, so a stale value can't be found. Files appear whole (written aside,
then renamed) and carry a checksum of their tensors, which every read checks. An entry found whole once is sealed with its
file's time of last change, so that a start need not read it again to know that it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "2"  # of what is stored; part of every key
SEALS = "seals.json"
KINDS = ("latents", "text", "masks", "bank")
Seal = tuple[str, int]  # the file's stamp when it was last found whole; the day it was last asked for


class Damaged(Exception):
    """An entry is not what was written."""


def key(*parts: str) -> str:
    """SHA-256 over parts, in hexadecimal; no two different lists of parts share their bytes."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in (VERSION, *parts)).encode()).hexdigest()


def today() -> int:
    """Days since 1970."""
    return int(time.time() // 86400)


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
        self.seals = self._load_seals()
        self.sealed: dict[str, Seal] = {}  # since the last saving

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def keys(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("??/*.safetensors")))

    def intact(self, key: str) -> bool:
        """Whether the entry exists and its tensors match their checksum; a damaged one is counted and removed."""
        stamp = self._stamp(key)
        if stamp is None:
            return False
        known = self.sealed.get(key) or self.seals.get(key)
        if known is None or known[0] != stamp:
            try:
                self._read(key)
            except Damaged:
                self.drop(key)
                return False
        self.sealed[key] = (stamp, today())
        return True

    def drop(self, key: str) -> None:
        """Count a damaged entry, and remove it."""
        self.damaged += 1
        self.path(key).unlink(missing_ok=True)
        self.sealed.pop(key, None)
        self.seals.pop(key, None)

    def remove(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def check(self, key: str) -> None:
        """Read an entry whatever its seal says.

        Raises:
            Damaged: it is not what was written.
        """
        self._read(key)

    def last_used(self, key: str) -> int:
        """The day a run last asked for an entry, or that it was written, in days since 1970."""
        known = self.seals.get(key)
        return known[1] if known else int(self.path(key).stat().st_mtime // 86400)

    def _stamp(self, key: str) -> str | None:
        try:
            stat = self.path(key).stat()
        except OSError:
            return None
        return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"

    def _read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry.

        Raises:
            Damaged: the file is gone, cut short, or changed.
        """
        try:
            with safe_open(self.path(key), "pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                if (file.metadata() or {}).get("sha256") == _checksum(tensors):
                    return tensors
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{self.path(key)}: {error}") from error
        raise Damaged(f"{self.path(key)}: its checksum is wrong")

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(contiguous, aside, metadata={"sha256": _checksum(contiguous)})
            Path(aside).replace(path)
        finally:
            Path(aside).unlink(missing_ok=True)

    def _load_seals(self) -> dict[str, Seal]:
        try:
            data = json.loads((self.folder / SEALS).read_text())
            return {str(key): (str(stamp), int(day)) for key, (stamp, day) in data.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def save_seals(self) -> None:
        """Keep what was learned for later starts; losing it costs them a reading of the entries."""
        if not self.sealed or not self.folder.is_dir():
            return
        merged = self._load_seals() | self.sealed  # another process may have saved its own
        handle, aside = tempfile.mkstemp(dir=self.folder, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump(merged, file)
        Path(aside).replace(self.folder / SEALS)
        self.seals, self.sealed = merged, {}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
