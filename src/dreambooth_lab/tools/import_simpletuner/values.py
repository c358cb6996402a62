"""Converters of option values, and the three ways in which an option is not mapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Settings = dict[str, Any]  # group or key of this project → value; groups begin with /
Options = dict[str, Any]  # the whole configuration


class NoEffect(Exception):
    """An option has no effect here; the message says why."""


class Unsupported(Exception):
    """An option is not supported; the message says what to do instead."""


class Refused(Exception):
    """An option requires training that this project does not support, so nothing is written."""


class Option(NamedTuple):
    say: Callable[[Any, Options], Settings]
    note: str = ""


def is_off(value: Any) -> bool:
    return str(value).strip().lower() in ("", "none", "null", "false", "0", "0.0", "no", "off", "disabled", "[]", "{}")


def number(value: Any) -> float | int:
    try:
        made = float(value)
    except (TypeError, ValueError) as error:
        raise Unsupported(f"{value!r} is not a number") from error
    return int(made) if made.is_integer() and "e" not in str(value).lower() and "." not in str(value) else made


def flag(value: Any) -> bool:
    if str(value).lower() not in ("true", "false", "1", "0"):
        raise Unsupported(f"{value!r} is neither true nor false")
    return str(value).lower() in ("true", "1")


def edge(value: Any) -> float | int:
    """1024, "1024x1024", or the first of "1024x1024,1280x768"."""
    sides = str(value).lower().split(",")[0].strip().split("x")
    if len(set(sides)) > 1:
        raise Unsupported(f"{value!r}: validation images are square; set validation.resolution")
    return number(sides[0])


def to(key: str, convert: Callable[[Any], Any] = lambda value: value, note: str = "") -> Option:
    return Option(lambda value, _: {key: convert(value)}, note)


def choice(key: str, names: dict[str, Any], note: str = "") -> Option:
    def say(value: Any, _: Options) -> Settings:
        if str(value) not in names:
            raise Unsupported(f"{value!r} is not supported; supported are {', '.join(names)}")
        return {key: names[str(value)]}

    return Option(say, note)


def no_effect(why: str) -> Option:
    def say(*_: Any) -> Settings:
        raise NoEffect(why)

    return Option(say)


def unbuilt(why: str) -> Option:
    """Not supported, unless it is off."""

    def say(value: Any, _: Options) -> Settings:
        raise NoEffect("off, and not supported here") if is_off(value) else Unsupported(why)

    return Option(say)


def refused(why: str) -> Option:
    """Refuses the whole configuration, unless it is off."""

    def say(value: Any, _: Options) -> Settings:
        raise NoEffect("off, and not supported here") if is_off(value) else Refused(why)

    return Option(say)
