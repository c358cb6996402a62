"""Validation of the raw webhook's messages."""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any, NamedTuple

LONGEST = {"run": 200, "prompt": 2000, "weights": 20, "name": 200}  # characters
MOST_LINES = 5000  # metrics in a message
PNG = b"\x89PNG\r\n\x1a\n"
FACTS = ("training_step", "sampler_step", "total_steps", "seed", "image_index")


class InvalidPayload(Exception):
    """An invalid message; the text says why."""


class Picture(NamedTuple):
    run: str
    final: bool
    prompt: str
    weights: str  # live or ema
    facts: dict[str, int]
    png: bytes


class Metrics(NamedTuple):
    run: str
    lines: list[tuple[int, str, float | None]]  # optimiser step, name, value


def read(body: bytes) -> Picture | Metrics:
    """
    Raises:
        InvalidPayload: it can't be parsed, or a field is missing, too long or of another type.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload("no JSON") from error
    if not isinstance(message, dict):
        raise InvalidPayload("not a JSON object")
    if message.get("type") == "metrics":
        return Metrics(_text(message, "run"), _lines(message.get("lines")))
    if message.get("type") not in ("preview", "image"):
        raise InvalidPayload("type must be preview, image or metrics")
    facts = {name: _whole(message, name) for name in FACTS}
    return Picture(
        _text(message, "run"),
        message["type"] == "image",
        _text(message, "prompt"),
        _text(message, "weights"),
        facts,
        _png(message),
    )


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or len(value) > LONGEST[key]:
        raise InvalidPayload(f"{key} must be a text of at most {LONGEST[key]} characters")
    return value


def _whole(values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise InvalidPayload(f"{key} must be a whole number")
    return value


def _png(values: dict[str, Any]) -> bytes:
    try:
        data = base64.b64decode(values.get("image", ""), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InvalidPayload("image must be base64") from error
    if not data.startswith(PNG):
        raise InvalidPayload("image must be a PNG")
    return data


def _lines(lines: Any) -> list[tuple[int, str, float | None]]:
    if not isinstance(lines, list) or len(lines) > MOST_LINES:
        raise InvalidPayload(f"lines must be a list of at most {MOST_LINES}")
    return [_line(line) for line in lines]


def _line(line: Any) -> tuple[int, str, float | None]:
    if not isinstance(line, list) or len(line) != 3:
        raise InvalidPayload("a line must be [step, name, value]")
    step, name, value = line
    known = _whole({"step": step}, "step"), _text({"name": name}, "name")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InvalidPayload("a line's value must be a number or null")
    return *known, float(value) if value is not None and math.isfinite(value) else None
