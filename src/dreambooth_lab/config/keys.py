"""The schema's keys by their dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_origin, get_type_hints

from .schema import Config


def kind_of(key: str) -> Any:
    """The type of a key in the schema; None if there is no such key."""
    kind: Any = Config
    for name in key.split("."):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif isinstance(kind, type) and is_dataclass(kind):
            kind = get_type_hints(kind).get(name)
        else:
            return None
    return kind


def all_keys(schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key with a value, in the schema's order."""
    for name, kind in get_type_hints(schema).items():
        if isinstance(kind, type) and is_dataclass(kind):
            yield from all_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def nearest(key: str) -> list[str]:
    """Keys of any group with the same or a similar last component; at most the three outermost."""
    ends = {one: one.rpartition(".")[2] for one in sorted(all_keys(), key=lambda one: one.count("."))}
    near = get_close_matches(key.rpartition(".")[2], set(ends.values()), n=1, cutoff=0.8)
    return [one for one, end in ends.items() if end in near][:3] or get_close_matches(key, ends, n=2, cutoff=0.75)
