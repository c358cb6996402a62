"""Images listed in a table: a .csv or .parquet file with a column of paths and columns of captions."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...config import ConfigError
from ..spec import Where
from .base import Item, local_stamp, stem
from .folder import filesystem
from .formats import SUFFIXES


class Table:
    """Rows of a table. Paths are absolute, URLs, or relative to the table's folder (or to a given folder)."""

    def __init__(self, where: Where):
        self.where = where
        self.notices: list[str] = []
        self.path = Path(where.path).expanduser().resolve()
        self.base = Path(where.root).expanduser().resolve() if where.root else self.path.parent
        self.root = f"{self.path}|{self.base}|{where.image_column}"

    def items(self) -> Iterator[Item]:
        rows = self._rows()
        self._refuse_columns(set(rows[0]) if rows else set())
        seen: set[str] = set()
        for number, row in enumerate(rows, 1):
            name = self._whole(str(row[self.where.image_column] or "").strip())
            captions = self._captions(row)
            if not name:
                yield Item(f"row {number}", "", (), f"its column {self.where.image_column!r} is empty")
            elif name in seen:
                yield Item(f"{name} (row {number})", "", (), "is listed twice in the table")
            else:
                seen.add(name)
                yield self._item(name, captions)

    def _item(self, name: str, captions: tuple[str, ...]) -> Item:
        if "://" in name and not name.startswith("file://"):
            return Item(name, "", captions)
        path = self._local(name)
        if not name.startswith(("/", "file://")) and not path.is_relative_to(self.base):
            return Item(name, "", captions, f"is outside of {str(self.base)!r}; give an absolute path, or move it there")
        try:
            stat = path.stat()
        except OSError as error:
            return Item(name, "", captions, f"can't be read: {error.strerror}")
        return Item(name, local_stamp(stat), captions)

    def _captions(self, row: dict[str, Any]) -> tuple[str, ...]:
        texts = tuple(text for column in self.where.caption_columns for text in _texts(row[column]))
        return texts or (tuple(_texts(row[self.where.fallback_column])) if self.where.fallback_column else ())

    def _local(self, name: str) -> Path:
        return (self.base / name.removeprefix("file://")).resolve()

    def _whole(self, name: str) -> str:
        """A name with its extension, which tables may omit."""
        if not name or ("://" in name and not name.startswith("file://")) or self._local(name).is_file():
            return name
        return next((name + suffix for suffix in sorted(SUFFIXES) if self._local(name + suffix).is_file()), name)

    def _rows(self) -> list[dict[str, Any]]:
        try:
            if self.path.suffix.lower() == ".parquet":
                return self._parquet()
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                return self._whole_rows(csv.DictReader(file, strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{str(self.path)!r} can't be read as a table ({error}); give a .csv or .parquet file") from error

    def _whole_rows(self, reader: csv.DictReader[str]) -> list[dict[str, Any]]:
        """All rows.

        Raises:
            ConfigError: a row has more cells than the table has columns, for example because of unquoted commas.
        """
        rows: list[dict[str, Any]] = []
        for row in reader:
            if extra := row.get(None):
                line, has = f"{str(self.path)!r}, line {reader.line_num}", len(row) - 1
                prefix = f"{line}, has {has + len(extra)} cells for {has} columns (too many: {', '.join(extra)!r})"
                raise ConfigError(f"{prefix}; put captions with commas in double quotes")
            rows.append(row)
        return rows

    def _parquet(self) -> list[dict[str, Any]]:
        import pyarrow  # takes a tenth of a second, so only if needed
        from pyarrow import parquet

        try:
            return parquet.read_table(self.path).to_pylist()
        except pyarrow.ArrowException as error:
            raise ConfigError(f"{str(self.path)!r} can't be read as parquet ({error})") from error

    def _refuse_columns(self, has: set[str]) -> None:
        if not has:
            raise ConfigError(f"{str(self.path)!r} has no rows")
        fallback = (self.where.fallback_column,) if self.where.fallback_column else ()
        for column in (self.where.image_column, *self.where.caption_columns, *fallback):
            if column not in has:
                near = get_close_matches(column, has, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{str(self.path)!r} has no column {column!r}{hint} It has: {', '.join(sorted(map(str, has)))}")

    def read(self, name: str) -> bytes:
        if "://" in name and not name.startswith("file://"):
            files, path = filesystem(name)
            return files.cat_file(path)
        return self._local(name).read_bytes()

    def text(self, name: str) -> str | None:
        path = self._local(stem(name) + ".txt")
        return path.read_text(encoding="utf-8-sig") if path.is_file() else None


def _texts(value: Any) -> list[str]:
    """The captions of a cell: a string, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [str(v).strip() for v in values if v is not None and str(v).strip()]
