"""Images below a folder, local or opened by fsspec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...config import ConfigError
from .base import Item, local_stamp, stem
from .formats import SNIFFED, hidden, name_status, sniff, unsupported_suffix

EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp",
          "https": "aiohttp", "sftp": "paramiko", "ssh": "paramiko"}  # fmt: skip


class SkippedFiles:
    """Counts the skipped items of a listing."""

    def __init__(self) -> None:
        self.hidden: list[str] = []
        self.masks: list[str] = []

    def notices(self, root: str) -> list[str]:
        """Notices about them; one line per kind."""
        lines = []
        if self.hidden:
            names = ", ".join(sorted(self.hidden)[:10]) + (f" and {len(self.hidden) - 10} more" if len(self.hidden) > 10 else "")
            lines.append(f"hidden and system folders and files in {root!r} are skipped: {names}")
        return lines + [f"{name} in {root!r} is not used for images, since masks are read from it" for name in self.masks]


class Folder:
    """A local folder, searched recursively. Links are followed, except links to a parent folder.

    Args:
        without: a subfolder that is skipped.
    """

    def __init__(self, path: str, without: str | None = None):
        self.path = Path(path).expanduser().resolve()
        self.without = Path(without).expanduser().resolve() if without else None
        self.root = str(self.path) + (f" without {self.without}" if without else "")
        self.notices: list[str] = []

    def items(self) -> Iterator[Item]:
        if not self.path.is_dir():
            state = "is a file" if self.path.exists() else "does not exist"
            raise ConfigError(f"{str(self.path)!r} {state}; it must be a folder with images")
        left = SkippedFiles()
        found = list(self._walk(self.path, "", frozenset(), left))
        self.notices = left.notices(str(self.path))
        yield from sorted(found, key=lambda item: item.name)

    def _walk(self, folder: Path, prefix: str, above: frozenset[tuple[int, int]], left: SkippedFiles) -> Iterator[Item]:
        try:
            own = folder.stat()
            if (own.st_dev, own.st_ino) in above:
                return
            entries = list(os.scandir(folder))
        except OSError as error:
            yield Item(prefix or ".", "", (), f"the folder can't be read: {error.strerror}")
            return
        for entry in entries:
            name = prefix + entry.name
            try:
                is_folder = entry.is_dir()
                if hidden(entry.name):
                    left.hidden += [name + "/" * is_folder] if is_folder or name_status(entry.name) is not None else []
                elif is_folder and Path(entry.path).resolve() == self.without:
                    left.masks.append(name + "/")
                elif is_folder:
                    yield from self._walk(Path(entry.path), name + "/", above | {(own.st_dev, own.st_ino)}, left)
                elif (why := self._file_status(entry)) is not None:
                    yield self._item(entry, name, why or None)
            except OSError as error:
                yield Item(name, "", (), f"can't be read: {error.strerror}")

    def _file_status(self, entry: os.DirEntry[str]) -> str | None:
        """By name, or by the file's first bytes if the name is ambiguous."""
        if not unsupported_suffix(entry.name) or not entry.is_file():
            return name_status(entry.name)
        with Path(entry.path).open("rb") as file:
            return sniff(file.read(SNIFFED))

    def _item(self, entry: os.DirEntry[str], name: str, why: str | None) -> Item:
        stat = entry.stat()
        if not entry.is_file():
            return Item(name, "", (), "is not a regular file")
        try:
            name.encode()
        except UnicodeEncodeError:
            return Item(ascii(name), "", (), "its name is not valid text; rename it")
        return Item(name, local_stamp(stat), (), why)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def text(self, name: str) -> str | None:
        path = self.path / f"{stem(name)}.txt"
        return path.read_text(encoding="utf-8-sig") if path.is_file() else None


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        ConfigError: the protocol is unknown, or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:  # every protocol has its own exceptions
        package = EXTRAS.get(url.split("://")[0]) if isinstance(error, ImportError) else None
        way_out = f"pip install {package}" if package else "see fsspec's list of protocols, and check that the location exists"
        raise ConfigError(f"{url!r} can't be opened ({type(error).__name__}: {error}); {way_out}") from error


class Remote:
    """A folder behind a URL (s3://bucket/photos, gs://…, memory://…), through fsspec."""

    def __init__(self, url: str):
        self.root = url.rstrip("/")
        self.files, self.path = filesystem(self.root)
        self.notices: list[str] = []

    def items(self) -> Iterator[Item]:
        try:
            found = self.files.find(self.path, detail=True)
        except Exception as error:  # every protocol has its own exceptions
            raise ConfigError(f"{self.root!r} can't be listed ({type(error).__name__}: {error})") from error
        if not found:
            raise ConfigError(f"{self.root!r} is empty or does not exist; give the URL of a folder with images")
        left = SkippedFiles()
        for path in sorted(found):
            name = path[len(self.path) :].lstrip("/")
            parts = name.split("/")
            if (first := next((i for i, part in enumerate(parts) if hidden(part)), None)) is not None:
                what = "/".join(parts[: first + 1]) + "/" * (first + 1 < len(parts))
                left.hidden += [what] if what not in left.hidden and (what != name or name_status(name) is not None) else []
            elif (why := self._file_status(path, name)) is not None:
                yield Item(name, _stamp(found[path]), (), why or None)
        self.notices = left.notices(self.root)

    def _file_status(self, path: str, name: str) -> str | None:
        return sniff(self.files.cat_file(path, start=0, end=SNIFFED)) if unsupported_suffix(name) else name_status(name)

    def read(self, name: str) -> bytes:
        return self.files.cat_file(f"{self.path}/{name}")

    def text(self, name: str) -> str | None:
        path = f"{self.path}/{stem(name)}.txt"
        return self.files.cat_file(path).decode("utf-8-sig") if self.files.exists(path) else None


def _stamp(info: dict[str, Any]) -> str:
    """Size and version of a remote file; "" if the protocol has no versions."""
    tells = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "created")
    version = next((info[key] for key in tells if info.get(key)), None)
    return f"{info.get('size')}:{version}" if version else ""
