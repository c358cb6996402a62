"""Read values of a step while the device continues with queued work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Event = torch.cuda.Event | None  # a position in the device's queue; None on a device without queue


def record_event(value: Tensor) -> Event:
    """The position in the device's queue at which a value, just enqueued, is ready."""
    if not value.is_cuda:
        return None
    made = torch.cuda.Event()
    made.record(torch.cuda.current_stream(value.device))
    return made


def read(values: Sequence[Tensor], since: Event) -> Tensor:
    """Scalars [] in one tensor on the CPU. Waits only for the event: a normal read would wait for the end of the queue."""
    if since is None:
        return torch.stack(list(values)).cpu()
    aside = torch.cuda.Stream(values[0].device)
    aside.wait_event(since)
    with torch.cuda.stream(aside):
        return torch.stack(list(values)).cpu()
