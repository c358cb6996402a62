"""Numbers of a step, read while the device goes on with what was queued after them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Event = torch.cuda.Event | None  # a place in the device's queue; None on a device that has none


def record_event(value: Tensor) -> Event:
    """The place in its device's queue where a value, just asked for, is there."""
    if not value.is_cuda:
        return None
    made = torch.cuda.Event()
    made.record(torch.cuda.current_stream(value.device))
    return made


def read(values: Sequence[Tensor], since: Event) -> Tensor:
    """Numbers [] in one tensor on the CPU. Waits for the mark alone: reading in the queue itself would wait for its end."""
    if since is None:
        return torch.stack(list(values)).cpu()
    aside = torch.cuda.Stream(values[0].device)
    aside.wait_event(since)
    with torch.cuda.stream(aside):
        return torch.stack(list(values)).cpu()
