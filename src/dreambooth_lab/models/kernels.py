"""Which of PyTorch's kernels a denoiser runs on: attention's, and compiled blocks."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import Attention, ConfigError

KERNELS = {
    Attention.math: SDPBackend.MATH,
    Attention.flash: SDPBackend.FLASH_ATTENTION,
    Attention.efficient: SDPBackend.EFFICIENT_ATTENTION,
    Attention.cudnn: SDPBackend.CUDNN_ATTENTION,
}
GRAPHS = 64  # versions of a block kept: with and without gradient, adapter, dropout; for each width and shape


class OneKernel(AttnProcessor2_0):
    """Attention by one kernel and no other, also where a block is run again for its gradient."""

    def __init__(self, kernel: SDPBackend):
        super().__init__()
        self.kernel = kernel

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        with sdpa_kernel(self.kernel):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def require(attention: Attention, compiles: bool, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what the device can't do, before any weights are read.

    Raises:
        ConfigError: says what is lacking.
    """
    if attention in (Attention.efficient, Attention.cudnn) and device.type != "cuda":
        raise ConfigError(f"model.attention is {attention.name}, which only CUDA devices have; use auto, flash or math")
    if attention in (Attention.flash, Attention.cudnn) and device.type == "cuda" and dtype is torch.float32:
        raise ConfigError(
            f"model.attention is {attention.name}, which CUDA has in 16 bits only; use model.dtype=bfloat16, or auto"
        )
    if compiles and device.type == "cuda" and not find_spec("triton"):
        raise ConfigError("model.compile is true, but triton, which compiles for CUDA, is not installed; set model.compile=false")
    compiler = os.environ.get("CXX", "g++")
    if compiles and device.type == "cpu" and not shutil.which(compiler):
        raise ConfigError(f"model.compile is true, but there is no C++ compiler {compiler!r}; install one, or set it to false")


def choose(model: Any, attention: Attention, compiles: bool) -> nn.Module:
    """A diffusers UNet on the chosen kernels; compiling happens when a block first runs."""
    if attention is not Attention.auto:
        model.set_attn_processor(OneKernel(KERNELS[attention]))
    if compiles:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
        model.compile_repeated_blocks()
    return model
