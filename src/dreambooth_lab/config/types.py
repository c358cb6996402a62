"""Type checks of a composed configuration after resolving `${…}`: missing values, broken references, wrong
types. OmegaConf checks single values when they are read; interpolated lists and records are checked here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, NamedTuple, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from .schema import Config


class Unreadable(NamedTuple):
    """A key whose value can't be used."""

    key: str
    problem: str | None  # None: the problem belongs to another key, which reports it


def unreadable(node: DictConfig, schema: type = Config, prefix: str = "") -> Iterator[Unreadable]:
    """Every key whose value is missing, or not of the schema's type."""
    for name, kind in get_type_hints(schema).items():
        key = prefix + name
        try:
            if name not in node or OmegaConf.is_missing(node, name):
                yield Unreadable(key, f"{key} has no value; set {key}=…")
            elif isinstance(value := node[name], DictConfig) and isinstance(kind, type) and is_dataclass(kind):
                yield from unreadable(value, kind, f"{key}.")
            elif lacking := _missing(value):
                yield Unreadable(key, f"{key} is {_typed(node, name)}, which lacks {', '.join(lacking)}; set that too")
            elif OmegaConf.is_interpolation(node, name) and (is_dataclass(kind) or get_origin(kind)):
                OmegaConf.merge(OmegaConf.structured(schema), {name: _plain(value)})
        except InterpolationToMissingValueError:
            yield Unreadable(key, None)
        except (OmegaConfBaseException, RecursionError) as error:
            yield Unreadable(key, f"{key} is {_typed(node, name)}, which can't be used: {_reason(error)}")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig | ListConfig) else value


def _missing(value: Any) -> list[str]:
    """Fields of records in a list or dict that have no value."""
    _plain(value)  # raises for broken interpolations
    return sorted(OmegaConf.missing_keys(value)) if isinstance(value, DictConfig | ListConfig) else []


def _typed(node: DictConfig, name: str) -> str:
    """A value as written, before interpolation."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    return repr(raw[name])


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it refers to itself; write the value itself"
    prefix = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
    return f"{prefix}; give a value of that type (a plain ${{ in a text is written \\${{)"
