"""Images of a Hugging Face dataset: a hub id, a folder that `save_to_disk` wrote, or one that `load_dataset` reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ...config import ConfigError
from ...storage.durable import atomic_file
from ..spec import Where
from .base import Item
from .table import _texts


class Hub:
    """A dataset with random access. Rows are named by their number; no code of the dataset is ever run."""

    streaming = False

    def __init__(self, where: Where):
        self.where = where
        self.notices: list[str] = []
        self.root = f"huggingface:{where.path}:{where.split}:{where.image_column}"
        self.data = self._load()

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(f"{self.where.path!r} needs datasets; pip install 'dreambooth-lab[huggingface]'") from error
        folder = Path(self.where.path).expanduser()
        try:
            if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
                data = datasets.load_from_disk(str(folder))
                data = data[self.where.split] if isinstance(data, dict) else data
                data = data.to_iterable_dataset() if self.streaming else data
            else:
                data = datasets.load_dataset(self.where.path, split=self.where.split, streaming=self.streaming)
        except Exception as error:  # the library raises a dozen kinds
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ConfigError(
                f"{self.where.path!r} can't be loaded as a dataset, split {self.where.split!r} ({type(error).__name__}: {reason})"
            ) from error
        self._refuse_columns(data.column_names or [])
        return data.cast_column(self.where.image_column, datasets.Image(decode=False))

    def _refuse_columns(self, has: list[str]) -> None:
        for column in (self.where.image_column, *self.where.caption_columns):
            if column not in has:
                near = get_close_matches(column, has, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise ConfigError(f"{self.where.path!r} has no column {column!r}{hint} It has: {', '.join(has)}")

    def items(self) -> Iterator[Item]:
        captions = self.data.select_columns(list(self.where.caption_columns)) if self.where.caption_columns else None
        for i in range(len(self.data)):
            values = captions[i] if captions is not None else {}
            yield Item(f"row {i:07d}", f"{self.data._fingerprint}:{i}", _captions(self.where, values))

    def read(self, name: str) -> bytes:
        return _bytes(self.data[int(name.removeprefix("row "))][self.where.image_column])

    def text(self, name: str) -> str | None:
        return None


class Stream(Hub):
    """A dataset that is read once, from the first row to the last; its files are stored in the spool, by content.

    Each start reads the stream again, since changes can be detected only by reading.
    """

    streaming = True

    def __init__(self, where: Where, spool: str):
        super().__init__(where)
        self.spool = Path(spool)
        self.files: dict[str, Path] = {}

    def items(self) -> Iterator[Item]:
        for i, row in enumerate(self.data):
            name = f"row {i:07d}"
            try:
                self.files[name] = self._keep(_bytes(row[self.where.image_column]))
                yield Item(name, "", _captions(self.where, row))
            except OSError as error:
                yield Item(name, "", (), str(error))

    def _keep(self, data: bytes) -> Path:
        path = self.spool / hashlib.sha256(data).hexdigest()
        if not path.is_file():
            with atomic_file(path) as aside:
                aside.write_bytes(data)
        return path

    def read(self, name: str) -> bytes:
        return self.files[name].read_bytes()


def _captions(where: Where, row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(text for column in where.caption_columns for text in _texts(row[column]))


def _bytes(cell: Any) -> bytes:
    if cell and cell.get("bytes"):
        return cell["bytes"]
    if cell and cell.get("path"):
        return Path(cell["path"]).read_bytes()
    raise OSError("the row has no image")
