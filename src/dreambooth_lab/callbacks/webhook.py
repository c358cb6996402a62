"""Telling other programs, without ever waiting for them.

Each receiver has its own thread and its own bounded queue. Previews give way: the oldest is dropped when the queue is full.
Pictures that are final are kept and tried again, with growing pauses, until they are delivered or the run has ended and the
patience for that is over. Every outcome is counted.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from ..config import ReceiverConfig, ReceiverKind

log = logging.getLogger(__name__)

TIMEOUT = httpx.Timeout(10.0, connect=5.0)  # seconds
PREVIEWS_WAITING = 8  # per receiver
PREVIEW_TRIES = 2
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the next try; the last repeats


@dataclass(frozen=True)
class Message:
    """One picture and what it is."""

    picture: Image.Image
    facts: dict[str, Any]  # prompt, sampler_step, total_steps, training_step, seed, image_index, run
    final: bool

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.picture.save(buffer, "PNG")
        return buffer.getvalue()


def raw_request(message: Message) -> dict[str, Any]:
    """Arguments of an HTTP POST: JSON with the picture as base64 PNG."""
    kind = "image" if message.final else "preview"
    return {"json": {"type": kind, **message.facts, "image": base64.b64encode(message.png()).decode()}}


def discord_request(message: Message) -> dict[str, Any]:
    """Arguments of an HTTP POST: Discord's multipart form. Mentions in prompts ping nobody."""
    f = message.facts
    text = f"**{f['run']}** step {f['training_step']}, {f['sampler_step']}/{f['total_steps']}: {f['prompt']}"
    payload = {"content": text[:2000], "allowed_mentions": {"parse": []}}
    return {"data": {"payload_json": json.dumps(payload)}, "files": {"files[0]": ("picture.png", message.png(), "image/png")}}


REQUESTS = {ReceiverKind.raw: raw_request, ReceiverKind.discord: discord_request}


class Receiver(threading.Thread):
    """Delivers to one address, in order, from a thread of its own.

    Args:
        name: as in the configuration.
        url: http(s) address; never logged.
        token: sent as a bearer token, or None.
    """

    def __init__(self, name: str, kind: ReceiverKind, url: str, token: str | None):
        super().__init__(name=f"webhook-{name}", daemon=True)
        self.label, self.request, self.url = name, REQUESTS[kind], url
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.previews: deque[Message] = deque()
        self.finals: deque[Message] = deque()
        self.counts: Counter[str] = Counter()
        self.wake = threading.Condition()
        self.deadline: float | None = None  # monotonic time after which nothing is tried any more

    def put(self, message: Message) -> None:
        """Take a message over; returns at once."""
        with self.wake:
            if message.final:
                self.finals.append(message)
            else:
                self.previews.append(message)
                if len(self.previews) > PREVIEWS_WAITING:
                    self.previews.popleft()
                    self.counts["dropped"] += 1
            self.wake.notify()

    def close(self, patience: float) -> None:
        """No more messages come; what waits may take `patience` seconds more."""
        with self.wake:
            self.deadline = time.monotonic() + patience
            self.wake.notify()

    def run(self) -> None:
        with httpx.Client(timeout=TIMEOUT, headers=self.headers, follow_redirects=False) as client:
            while message := self._next():
                self._deliver(client, message)

    def _next(self) -> Message | None:
        """The next message, finals first; None when closed and empty, or out of time."""
        with self.wake:
            while not self.finals and not self.previews and self.deadline is None:
                self.wake.wait()
            if self.deadline is not None and (self._late() or not (self.finals or self.previews)):
                self.counts["dropped"] += len(self.finals) + len(self.previews)
                return None
            return self.finals.popleft() if self.finals else self.previews.popleft()

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _deliver(self, client: httpx.Client, message: Message) -> None:
        arguments, tries = self.request(message), 0
        while True:
            pause = self._post(client, arguments, tries)
            if pause is None:
                self.counts["sent"] += 1
                return
            tries += 1
            if tries == 1 and not self.counts["retried"]:
                log.warning("webhook %s does not take messages; trying again while the run goes on", self.label)
            if self._late() or (not message.final and tries >= PREVIEW_TRIES):
                self.counts["dropped"] += 1
                return
            self.counts["retried"] += 1
            with self.wake:
                self.wake.wait_for(lambda: self.deadline is not None, timeout=pause)

    def _post(self, client: httpx.Client, arguments: dict[str, Any], tries: int) -> float | None:
        """None when delivered, else seconds to wait. The answer's body is never read: only its status matters."""
        pause = PAUSES[min(tries, len(PAUSES) - 1)]
        try:
            with client.stream("POST", self.url, **arguments) as response:
                if response.status_code < 300:
                    return None
                if response.status_code == 429:
                    return min(float(response.headers.get("retry-after", pause)), 60.0)
                return pause
        except (httpx.HTTPError, ValueError):
            return pause


class Sender:
    """All receivers of a run."""

    def __init__(self, receivers: list[Receiver]):
        self.receivers = receivers
        for receiver in receivers:
            receiver.start()

    def send(self, message: Message) -> None:
        """Hand a message to every receiver; returns at once, raises nothing."""
        for receiver in self.receivers:
            receiver.put(message)

    def close(self, patience: float) -> dict[str, dict[str, int]]:
        """Let what waits be delivered for at most `patience` seconds; receiver → how many were sent, retried, dropped."""
        for receiver in self.receivers:
            receiver.close(patience)
        for receiver in self.receivers:
            receiver.join(patience + TIMEOUT.read if TIMEOUT.read else patience)
        return {r.label: {name: r.counts[name] for name in ("sent", "retried", "dropped")} for r in self.receivers}


def build_receiver(name: str, cfg: ReceiverConfig) -> Receiver:
    """A receiver with its secrets read from the environment; `check` has seen that they are there."""
    url = os.environ[cfg.url_env] if cfg.url_env else cfg.url
    assert url is not None
    return Receiver(name, cfg.kind, url, os.environ[cfg.token_env] if cfg.token_env else None)
