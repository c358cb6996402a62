"""Messages of webhooks: an image or metrics, and their format for each kind of receiver."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ..config import enums

PREVIEW_TRIES = 2


@dataclass(frozen=True)
class Message:
    """One image with its metadata."""

    picture: Image.Image | Path  # a final one is a file, so that queued ones take no memory
    facts: dict[str, Any]  # prompt, sampler_step, total_steps, training_step, weights, seed, image_index, run
    final: bool
    kind: ClassVar[str] = ""  # prefix of the names of its counts
    size: ClassVar[int] = 1

    @property
    def tries(self) -> float:
        return math.inf if self.final else PREVIEW_TRIES

    def png(self) -> bytes:
        """
        Raises:
            OSError: the file no longer exists.
        """
        if isinstance(self.picture, Path):
            return self.picture.read_bytes()
        buffer = io.BytesIO()
        self.picture.save(buffer, "PNG")
        return buffer.getvalue()


Line = tuple[int, str, float | None]  # optimiser step, name, value; None if it is not finite


@dataclass(frozen=True)
class Metrics:
    """Some logged metrics of a run."""

    run: str
    lines: tuple[Line, ...]
    kind: ClassVar[str] = "numbers "
    tries: ClassVar[float] = 1

    @property
    def size(self) -> int:
        return len(self.lines)


def raw_request(message: Message) -> dict[str, Any]:
    """Arguments of an HTTP POST: JSON with the image as base64 PNG."""
    kind = "image" if message.final else "preview"
    return {"json": {"type": kind, **message.facts, "image": base64.b64encode(message.png()).decode()}}


def metrics_request(numbers: Metrics) -> dict[str, Any]:
    """Arguments of an HTTP POST: JSON, each line [step, name, value]."""
    return {"json": {"type": "metrics", "run": numbers.run, "lines": numbers.lines}}


def discord_request(message: Message) -> dict[str, Any]:
    """Arguments of an HTTP POST: Discord's multipart form. Mentions in prompts notify nobody."""
    f = message.facts
    text = f"**{f['run']}** step {f['training_step']}, {f['sampler_step']}/{f['total_steps']}: {f['prompt']}"
    payload = {"content": text[:2000], "allowed_mentions": {"parse": []}}
    return {"data": {"payload_json": json.dumps(payload)}, "files": {"files[0]": ("picture.png", message.png(), "image/png")}}


REQUESTS = {enums.ReceiverKind.raw: raw_request, enums.ReceiverKind.discord: discord_request}
