"""Open the source that a configuration names."""

from __future__ import annotations

from ..spec import Where
from .base import Source


def open_source(where: Where, spool: str) -> Source:
    """The source of a location.

    Args:
        spool: folder for sources that can be read only once (streams).
    """
    from .folder import Folder, Remote
    from .hub import Hub, Stream
    from .table import Table

    kind = where.type.name
    if kind == "table":
        return Table(where)
    if kind == "huggingface":
        return Stream(where, spool) if where.streaming else Hub(where)
    return Remote(where.path) if "://" in where.path else Folder(where.path, where.without)
