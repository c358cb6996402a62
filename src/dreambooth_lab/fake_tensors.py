"""Fake tensors (without data): find what a computation would allocate, without computing or loading anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def fake() -> Iterator[None]:
    """A context in which tensors have no data; tensors of one shape compare as equal. Modules can't change them in place, so
    moving a module gives it new parameters."""

    def move(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(change)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(change(parameter.detach()), parameter.requires_grad)
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer if buffer is None else change(buffer)
        return self

    def equal(one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape

    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(nn.Module, "_apply", move), patch.object(torch, "equal", equal):
        yield


class LiveBytes(TorchDispatchMode):
    """Counts the bytes allocated in its context, by storage.

    Args:
        before: tensors that exist already, such as weights, and are not counted.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in before}
        self.held = dict[int, Any]()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self.track(tensor)
        return out

    def track(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        self.held[key] = weakref.ref(storage, lambda _: self._release(key))

    def _release(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)
        self.held.pop(key, None)
