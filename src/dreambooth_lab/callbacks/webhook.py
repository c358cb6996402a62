"""Webhooks that never block training.

Each receiver has its own thread and its own bounded queues. When the queue of previews is full, the oldest is dropped.
Final images are files, and are retried with increasing pauses until they are delivered, or until the time limit after the end of
the run. Metrics are sent together, at most once per second, without retries; when their queue is full, the oldest are dropped.
Every outcome is counted.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import Counter, deque
from typing import Any

import httpx

from ..config import ReceiverConfig, enums
from .messages import REQUESTS, Line, Message, Metrics, metrics_request

log = logging.getLogger(__name__)
for _talker in ("httpx", "httpcore"):
    logging.getLogger(_talker).setLevel(logging.WARNING)  # they log every address, and a webhook's address can be secret

TIMEOUT = httpx.Timeout(10.0, connect=5.0)  # seconds
PREVIEWS_WAITING = 8  # per receiver
METRICS_WAITING = 2000  # per receiver
METRICS_EVERY = 1.0  # seconds between two messages of metrics
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the next retry; the last repeats
LAST_PAUSE = 0.5  # maximum pause after the end of the run, seconds
OUTCOMES = ("sent", "retried", "dropped", "numbers sent", "numbers dropped")


class Receiver(threading.Thread):
    """Delivers to one address, in order, in its own thread.

    Args:
        name: as in the configuration.
        kind: raw receivers get metrics too.
        url: http(s) address; never logged.
        token: sent as a bearer token, or None.
    """

    def __init__(self, name: str, kind: enums.ReceiverKind, url: str, token: str | None):
        super().__init__(name=f"webhook-{name}", daemon=True)
        self.label, self.url, self.wants_metrics = name, url, kind is enums.ReceiverKind.raw
        self.request = REQUESTS[kind]
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.previews: deque[Message] = deque()
        self.finals: deque[Message] = deque()
        self.metrics: deque[tuple[str, Line]] = deque()  # each with its run
        self.metrics_due = 0.0  # monotonic time before which no metrics are sent
        self.counts: Counter[str] = Counter()
        self.wake = threading.Condition()
        self.deadline: float | None = None  # monotonic time after which nothing is sent

    def put(self, message: Message) -> None:
        """Queue a message; returns immediately."""
        with self.wake:
            if message.final:
                self.finals.append(message)
            else:
                self.previews.append(message)
                if len(self.previews) > PREVIEWS_WAITING:
                    self.previews.popleft()
                    self.counts["dropped"] += 1
            self.wake.notify()

    def put_metrics(self, run: str, lines: list[Line]) -> None:
        """Queue metrics; returns immediately."""
        with self.wake:
            idle = not self.metrics
            self.metrics.extend((run, line) for line in lines)
            while len(self.metrics) > METRICS_WAITING:
                self.metrics.popleft()
                self.counts["numbers dropped"] += 1
            if idle:
                self.wake.notify()

    def close(self, patience: float) -> None:
        """Accept no more messages; queued ones are sent for at most `patience` seconds."""
        with self.wake:
            self.deadline = time.monotonic() + patience
            self.wake.notify()

    def run(self) -> None:
        with httpx.Client(timeout=TIMEOUT, headers=self.headers, follow_redirects=False) as client:
            while message := self._next():
                self._deliver(client, message)

    def _next(self) -> Message | Metrics | None:
        """The next message, final images first; None when closed and empty, or after the deadline."""
        with self.wake:
            while not self._late():
                if self.finals or self.previews:
                    return (self.finals or self.previews).popleft()
                ending, pause = self.deadline is not None, self.metrics_due - time.monotonic()
                if self.metrics and (ending or pause <= 0):
                    return self._metrics_message()
                if ending:
                    return None
                self.wake.wait(pause if self.metrics else None)
            self.counts["dropped"] += len(self.finals) + len(self.previews)
            self.counts["numbers dropped"] += len(self.metrics)
            return None

    def _metrics_message(self) -> Metrics:
        """All queued metrics of the oldest one's run."""
        run = self.metrics[0][0]
        lines = tuple(line for name, line in self.metrics if name == run)
        self.metrics = deque(item for item in self.metrics if item[0] != run)
        self.metrics_due = time.monotonic() + METRICS_EVERY
        return Metrics(run, lines)

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _deliver(self, client: httpx.Client, message: Message | Metrics) -> None:
        try:
            arguments = metrics_request(message) if isinstance(message, Metrics) else self.request(message)
        except OSError:
            self.counts[f"{message.kind}dropped"] += message.size
            log.warning("webhook %s: an image was removed from the run's folder before it was sent", self.label)
            return
        tries = 0
        while True:
            pause = self._post(client, arguments, tries)
            if pause is None:
                self.counts[f"{message.kind}sent"] += message.size
                return
            tries += 1
            if not self.counts["failed"]:
                log.warning("webhook %s does not accept messages; retrying while the run continues", self.label)
            self.counts["failed"] += 1
            if self._late() or tries >= message.tries:
                self.counts[f"{message.kind}dropped"] += message.size
                return
            self.counts["retried"] += 1
            self._rest(pause)

    def _rest(self, pause: float) -> None:
        """Wait before the next retry; the end of the run interrupts one pause, and shortens the later ones."""
        with self.wake:
            if self.deadline is None:
                self.wake.wait_for(lambda: self.deadline is not None, timeout=pause)
            else:
                self.wake.wait(max(min(pause, LAST_PAUSE, self.deadline - time.monotonic()), 0.01))

    def _post(self, client: httpx.Client, arguments: dict[str, Any], tries: int) -> float | None:
        """None when delivered, else seconds to wait. The body of the response is never read, only the status."""
        pause = PAUSES[min(tries, len(PAUSES) - 1)]
        try:
            with client.stream("POST", self.url, **arguments) as response:
                if response.status_code < 300:
                    return None
                if response.status_code == 429:
                    return min(float(response.headers.get("retry-after", pause)), 60.0)
                return pause
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return pause


class Sender:
    """All receivers of a run."""

    def __init__(self, receivers: list[Receiver]):
        self.receivers = receivers
        for receiver in receivers:
            receiver.start()

    def send(self, message: Message) -> None:
        """Send a message to every receiver; returns immediately, raises nothing."""
        for receiver in self.receivers:
            receiver.put(message)

    def send_metrics(self, run: str, step: int, values: dict[str, float]) -> None:
        """Send logged metrics to every receiver that accepts them; returns immediately, raises nothing."""
        lines: list[Line] = [(step, name, value if math.isfinite(value) else None) for name, value in values.items()]
        for receiver in self.receivers:
            if receiver.wants_metrics:
                receiver.put_metrics(run, lines)

    def close(self, patience: float) -> dict[str, dict[str, int]]:
        """Deliver queued messages for at most `patience` seconds; receiver → its counts by `OUTCOMES`."""
        for receiver in self.receivers:
            receiver.close(patience)
        for receiver in self.receivers:
            receiver.join(patience + TIMEOUT.read if TIMEOUT.read else patience)
        return {r.label: {name: r.counts[name] for name in OUTCOMES} for r in self.receivers}


def build_receiver(name: str, cfg: ReceiverConfig) -> Receiver:
    """A receiver with its secrets read from the environment; `check` has verified that they exist."""
    url = os.environ[cfg.url_env] if cfg.url_env else cfg.url
    assert url is not None
    return Receiver(name, cfg.kind, url, os.environ[cfg.token_env] if cfg.token_env else None)
