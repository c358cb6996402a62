"""Problems of the data, reported together before training."""

from __future__ import annotations

from ...config import ConfigError
from ..sources.base import Rejected
from ..spec import DatasetSpec
from .entry import Entry

MOST_LISTED = 40  # problems shown at once


def raise_problems(
    specs: list[DatasetSpec], entries: list[Entry], rejected: dict[str, list[Rejected]], problems: list[str]
) -> None:
    """Raise one `ConfigError` with all problems, including datasets without a usable image; do nothing if there are none."""
    usable, lines = {entry.spec.id for entry in entries}, list(problems)
    for one in specs:
        if one.id in usable or any(p.startswith((one.named, f"{one.id}:")) for p in lines):
            continue
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in rejected[one.id][:MOST_LISTED]) or "no image files"
        lines.append(f"{one.named} is {one.where.path!r}, which has no usable image ({reasons})")
    if not lines and not any(entry.weight for entry in entries if not entry.spec.is_eval):
        lines.append("no dataset contributes rows; set a probability above 0")
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        more = [f"and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
        raise ConfigError(f"{len(lines)} problem(s) in the data:\n" + "\n".join(f"  - {p}" for p in lines[:MOST_LISTED] + more))
