"""Selects a denoiser's kernels: attention kernels and compiled blocks."""

from __future__ import annotations

import os
import shutil
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import ConfigError, enums

KERNELS = {
    enums.Attention.math: SDPBackend.MATH,
    enums.Attention.flash: SDPBackend.FLASH_ATTENTION,
    enums.Attention.efficient: SDPBackend.EFFICIENT_ATTENTION,
    enums.Attention.cudnn: SDPBackend.CUDNN_ATTENTION,
}
GRAPHS = 64  # maximum compiled versions of a block: with and without gradient, adapter, dropout; for each width and shape


def on_kernel(processor: Any, kernel: SDPBackend) -> Any:
    """A diffusers attention processor restricted to one kernel, also when a block is recomputed for its gradient."""
    kind: Any = type(processor)

    @wraps(kind.__call__)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        with sdpa_kernel(kernel):
            return kind.__call__(self, *args, **options)

    processor.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return processor


def require(attention: enums.Attention, compiles: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse kernels that the device does not support, before any weights are read.

    Raises:
        ConfigError: names what is missing.
    """
    if attention in (enums.Attention.efficient, enums.Attention.cudnn) and device.type != "cuda":
        raise ConfigError(f"model.attention is {attention.name}, which only CUDA devices have; use auto, flash or math")
    if attention in (enums.Attention.flash, enums.Attention.cudnn) and device.type == "cuda" and dtype is torch.float32:
        raise ConfigError(
            f"model.attention is {attention.name}, which supports only 16-bit dtypes on CUDA; use model.dtype=bfloat16, or auto"
        )
    if compiles and device.type == "cuda" and not find_spec("triton"):
        raise ConfigError("model.compile is true, but triton, which compiles for CUDA, is not installed; set model.compile=false")
    compiler = os.environ.get("CXX", "g++")
    if compiles and device.type == "cpu" and not shutil.which(compiler):
        raise ConfigError(f"model.compile is true, but there is no C++ compiler {compiler!r}; install one, or set it to false")


def choose(model: Any, attention: enums.Attention, compiles: bool) -> nn.Module:
    """A diffusers denoiser with the chosen kernels; a block is compiled at its first call."""
    if attention is not enums.Attention.auto:
        for layer in model.modules():
            if callable(getattr(layer, "processor", None)):
                on_kernel(layer.processor, KERNELS[attention])
    if compiles:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        model.compile_repeated_blocks()
    return model
