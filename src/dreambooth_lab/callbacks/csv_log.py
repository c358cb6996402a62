"""CSV files that are appended to during a run."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints


class CsvLog:
    """A CSV file of one kind of record, a NamedTuple whose first field is the optimiser step.

    Args:
        path: of the file, created with the first record.
        record: the NamedTuple; its annotations (int, float, str) define how cells are parsed.
    """

    def __init__(self, path: Path, record: type[Any]):
        self.path, self.record = path, record
        self.kinds = tuple(get_type_hints(record).values())

    def read(self) -> list[Any]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))[1:]
        return [self.record(*(kind(cell) for kind, cell in zip(self.kinds, line, strict=True))) for line in lines]

    def add(self, step: int, records: Sequence[Any]) -> None:
        """Append a step's records; earlier records of this and later steps (from before a resume) are replaced."""
        older = [record for record in self.read() if record[0] < step]
        self._write([*older, *records])

    def _write(self, records: Sequence[Any]) -> None:
        """Write atomically."""
        aside = self.path.with_suffix(".part")
        with aside.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.record._fields, *records])
        aside.replace(self.path)
