"""Atomic writes of files and folders, and locks for a single writer. Imports no torch."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

LOCK = ".lock"


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    replace_file(part, path)


def replace_file(part: Path, path: Path) -> None:
    """Replace a file by another, after syncing its bytes to the disk.

    Args:
        part: in the same folder as `path`.
    """
    _sync(part)
    part.replace(path)
    _sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which replaces another one at the end. A kill between the two renames leaves the complete new
    folder beside the missing one; `finish_replacement` then moves it."""
    finish_replacement(path)
    made = _new(path)
    made.mkdir(parents=True)
    try:
        yield made
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    for file in (file for file in made.rglob("*") if file.is_file()):
        _sync(file)
    if path.exists():
        path.rename(_old(path))
    made.rename(path)
    _sync(path.parent)
    shutil.rmtree(_old(path), ignore_errors=True)


def finish_replacement(path: Path) -> None:
    """Finish the replacement of a killed process: the folder is complete again, and temporary folders are removed."""
    if not path.exists() and _old(path).exists():  # killed between the renames, when the new one was complete
        (_new(path) if _new(path).exists() else _old(path)).rename(path)
    for left in (_new(path), _old(path)):
        shutil.rmtree(left, ignore_errors=True)


def is_complete_archive(path: Path) -> bool:
    """Whether a zip archive, such as torch.save's, is complete and undamaged. Reads all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (
        OSError,
        EOFError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
    ):  # all exceptions of zipfile for damaged files
        return False


def lock(folder: Path) -> FileLock | None:
    """A lock on a folder, held until it is released or the process ends; None: another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout:
        return None
    return held


def claim(stem: Path) -> Path:
    """Make a new folder, `stem` or the first of `stem`_2, `stem`_3 … that no other process has."""
    number = 1
    while True:
        folder = stem if number == 1 else stem.with_name(f"{stem.name}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces it at the end; after an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid4().hex[:12]}.part")
    mode = _create(aside)
    try:
        yield aside
        aside.chmod(mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def apply_umask(folder: Path) -> None:
    """Give every file below a folder the default mode of new files."""
    probe = folder / f"{uuid4().hex}.part"
    mode = _create(probe)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _new(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _sync(path: Path) -> None:
    """Sync a file or folder to the disk; folders are skipped on systems that can't sync them."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs only writable files
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _create(path: Path) -> int:
    """Make an empty file; returns its mode."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
