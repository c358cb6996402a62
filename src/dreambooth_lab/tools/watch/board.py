"""The page's state: its runs and connected browsers. Everything is bounded; the oldest entries are dropped."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from itertools import count
from typing import Any, NamedTuple

from .payload import Metrics, Picture

MOST_RUNS, MOST_SERIES, MOST_POINTS = 20, 300, 5000
MOST_BYTES = 256 * 2**20  # of images of all runs
MOST_REPLACED = 32  # replaced previews that are still served
MOST_WAITING = 1000  # queued events per browser; a slower one must reconnect

Slot = tuple[Any, ...]
Event = dict[str, Any]


class StoredImage(NamedTuple):
    number: int  # its id in URLs
    slot: Slot
    picture: Picture

    def event(self) -> Event:
        picture = self.picture
        about = {"run": picture.run, "prompt": picture.prompt, "weights": picture.weights, "final": picture.final}
        return {"kind": "picture", "number": self.number, **about, **picture.facts}


class Board:
    def __init__(self) -> None:
        self.runs: OrderedDict[str, dict[str, deque[tuple[int, float | None]]]] = OrderedDict()  # metrics by name
        self.pictures: OrderedDict[Slot, StoredImage] = OrderedDict()
        self.by_number: dict[int, StoredImage] = {}
        self.replaced: OrderedDict[int, bytes] = OrderedDict()  # previews that a browser may be about to request
        self.bytes = 0
        self.numbers = count(1)
        self.listeners: set[asyncio.Queue[Event | None]] = set()

    def receive(self, letter: Picture | Metrics) -> None:
        """Store a run's message, and send it to all browsers."""
        self._know(letter.run)
        self._publish(self._image_event(letter) if isinstance(letter, Picture) else self._metrics_event(letter))

    def _know(self, run: str) -> None:
        self.runs.setdefault(run, {})
        self.runs.move_to_end(run)
        if len(self.runs) > MOST_RUNS:
            gone, _ = self.runs.popitem(last=False)
            for slot in [slot for slot in self.pictures if slot[0] == gone]:
                self._drop(slot)
            self._publish({"kind": "gone", "run": gone})

    def _image_event(self, message: Picture) -> Event:
        place = (message.run, message.weights, message.prompt, message.facts["image_index"])
        self._replace((*place, "preview"))  # only the newest preview of an image is kept, until the image is done
        slot = (*place, message.facts["training_step"]) if message.final else (*place, "preview")
        self._drop(slot)
        kept = StoredImage(next(self.numbers), slot, message)
        self.pictures[slot] = self.by_number[kept.number] = kept
        self.bytes += len(message.png)
        while self.bytes > MOST_BYTES and len(self.pictures) > 1:
            self._drop(next(iter(self.pictures)))
        return kept.event()

    def _replace(self, slot: Slot) -> None:
        """Remove it from the board, but serve it for a while for browsers that are about to request it."""
        if slot in self.pictures:
            old = self.pictures[slot]
            self.replaced[old.number] = old.picture.png
            if len(self.replaced) > MOST_REPLACED:
                self.replaced.popitem(last=False)
            self._drop(slot)

    def _drop(self, slot: Slot) -> None:
        kept = self.pictures.pop(slot, None)
        if kept:
            del self.by_number[kept.number]
            self.bytes -= len(kept.picture.png)

    def _metrics_event(self, message: Metrics) -> Event:
        series = self.runs[message.run]
        lines = [line for line in message.lines if line[1] in series or len(series) < MOST_SERIES]
        for step, name, value in lines:
            points = series.setdefault(name, deque(maxlen=MOST_POINTS))
            while points and points[-1][0] >= step:  # a run that was resumed from an earlier step sends it again
                points.pop()
            points.append((step, value))
        return {"kind": "numbers", "run": message.run, "lines": lines}

    def png(self, number: int) -> bytes | None:
        return self.by_number[number].picture.png if number in self.by_number else self.replaced.get(number)

    def snapshot(self) -> list[Event]:
        """Events with the current state, for a new browser."""
        lines: list[Event] = [
            {"kind": "numbers", "run": run, "lines": [(step, name, v) for name, points in series.items() for step, v in points]}
            for run, series in self.runs.items()
        ]
        return lines + [kept.event() for kept in self.pictures.values()]

    def join(self) -> asyncio.Queue[Event | None]:
        """Connect a browser; None in its queue means that it must reconnect."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue(MOST_WAITING)
        self.listeners.add(queue)
        return queue

    def leave(self, queue: asyncio.Queue[Event | None]) -> None:
        self.listeners.discard(queue)

    def _publish(self, event: Event) -> None:
        for queue in list(self.listeners):
            if queue.full():
                self.listeners.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)
