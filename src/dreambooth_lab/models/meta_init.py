"""Initialise a component on the meta device with the names, shapes and dtypes of its library's load; buffers are real."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Empty(TorchFunctionMode):
    """A context in which parameters are created on the meta device, while computed buffers, such as positions, are real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs | {"device": "meta"}) if func is torch.empty else func(*args, **kwargs)


def build(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The architecture, with every parameter in the dtype of the class's `from_pretrained`."""
    of_diffusers = kind.__module__.startswith("diffusers")
    with _default(dtype), _Empty():
        model = kind.from_config(kind.load_config(folder)) if of_diffusers else kind(kind.config_class.from_pretrained(folder))
    kept = set(_kept(model, dtype, of_diffusers))
    new: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                to = torch.float32 if kept & {*name.split("."), own} else dtype
                empty = torch.empty_like(parameter, device="meta", dtype=to if parameter.is_floating_point() else None)
                module._parameters[own] = new.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
    return _cast_buffers(model, dtype) if of_diffusers and not kept else model


def allocated(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same on a device, frozen, with uninitialised parameters; fake ones under a `FakeTensorMode`."""
    model = build(kind, folder, dtype)
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[own] = new.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
    return model.eval()


def _kept(model: Any, dtype: torch.dtype, of_diffusers: bool) -> tuple[str, ...]:
    """Name components of modules that stay in float32."""
    if of_diffusers:
        return tuple(model._keep_in_fp32_modules or ())
    return tuple(model._get_dtype_plan(dtype))


def _cast_buffers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in model.modules():
        for own, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[own] = buffer.to(dtype)
    return model


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
