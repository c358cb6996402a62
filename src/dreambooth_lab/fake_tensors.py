"""Fake tensors (without data): find what a computation would allocate, without computing or loading anything."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
KNOWN = 2**16  # entries of the largest tensor whose values are kept
FILLED = {
    aten.zeros.default: 0, aten.new_zeros.default: 0, aten.zeros_like.default: 0,
    aten.ones.default: 1, aten.new_ones.default: 1, aten.ones_like.default: 1,
}  # fmt: skip
COUNTED = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.full.default}


class KnownValues(TorchDispatchMode):
    """Small tensors that are made from numbers keep their values inside a `FakeTensorMode`, as do those computed from them alone:
    tokens, their masks and positions, from which networks read lengths."""

    def __init__(self, mode: fake_tensor.FakeTensorMode):
        super().__init__()
        self.fakes = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func in FILLED or func in COUNTED) or out.numel() > KNOWN or out.device.type != "cpu":
            return out
        with _disable_current_modes():
            real = torch.full(out.shape, FILLED[func], dtype=out.dtype) if func in FILLED else func(*args, **(kwargs or {}))
        return self.fakes.fake_tensor_converter.from_real_tensor(self.fakes, real, make_constant=True)


@contextmanager
def fake() -> Iterator[None]:
    """A context in which tensors have no data, except small ones made from numbers; tensors of one shape compare as
    equal. Modules can't change them in place, so moving a module gives it new parameters."""

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

    with (
        patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", KNOWN),
        fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode,
        KnownValues(mode),
        patch.object(nn.Module, "_apply", move),
        patch.object(torch, "equal", equal),
    ):
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
