"""A content-addressed store of tensors on disk, shared by runs and processes.

A key is the hash of everything its value depends on, so a stale value can't be found. Files are written atomically (to a
temporary file, then renamed) and contain a checksum of their tensors, which every read verifies. The index remembers the
modification time of each verified file, so that a later start need not read it again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...storage.durable import atomic_file

INDEX = "seals.json"
KINDS = ("latents", "text", "masks", "bank")
IndexEntry = tuple[str, int]  # the file's stamp when it was last verified; the day it was last used


class Damaged(Exception):
    """An entry is damaged."""


def current_day() -> int:
    """Days since 1970."""
    return int(time.time() // 86400)


class Store:
    """One kind of value under a cache root.

    Args:
        root: the cache folder, created if absent.
        kind: name of the sub-folder.
    """

    def __init__(self, root: Path, kind: str):
        self.folder = root / kind
        self.damaged = 0
        self.read = lru_cache(maxsize=512)(self._read)  # a subject's whole set stays in memory
        self.index = self._load_index()
        self.sealed: dict[str, IndexEntry] = {}  # since the index was last saved

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def keys(self) -> Iterator[str]:
        return (path.stem for path in sorted(self.folder.glob("??/*.safetensors")))

    def is_intact(self, key: str) -> bool:
        """Whether the entry exists and its tensors match their checksum; a damaged one is counted and removed."""
        stamp = self._stamp(key)
        if stamp is None:
            return False
        known = self.sealed.get(key) or self.index.get(key)
        if known is None or known[0] != stamp:
            try:
                self._read(key)
            except Damaged:
                self.drop(key)
                return False
        self.sealed[key] = (stamp, current_day())
        return True

    def drop(self, key: str) -> None:
        """Count a damaged entry, and remove it."""
        self.damaged += 1
        self.path(key).unlink(missing_ok=True)
        self.sealed.pop(key, None)
        self.index.pop(key, None)

    def remove(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def check(self, key: str) -> None:
        """Read an entry and verify it, whatever the index says.

        Raises:
            Damaged: its checksum is wrong.
        """
        self._read(key)

    def last_used(self, key: str) -> int:
        """The day on which an entry was last used or written, in days since 1970."""
        known = self.index.get(key)
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
            Damaged: the file is missing, truncated or changed.
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
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with atomic_file(path) as aside:
            save_file(contiguous, aside, metadata={"sha256": _checksum(contiguous)})

    def _load_index(self) -> dict[str, IndexEntry]:
        try:
            data = json.loads((self.folder / INDEX).read_text())
            return {str(key): (str(stamp), int(day)) for key, (stamp, day) in data.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def save_index(self) -> None:
        """Save the index for later starts; without it they must read the entries again."""
        if not self.sealed or not self.folder.is_dir():
            return
        merged = self._load_index() | self.sealed  # another process may have saved its own
        with atomic_file(self.folder / INDEX) as aside:
            aside.write_text(json.dumps(merged), encoding="utf-8")
        self.index, self.sealed = merged, {}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
