"""T-LoRA (Soboleva et al., AAAI 2026): the rank of a LoRA by the time of each row, and its orthogonal start.

At a time t the first r(t) of a layer's r ranks act, and the others are left out:

    W x + s B M_t A x,    M_t = diag(1, …, 1, 0, …, 0) with r(t) ones,    r(t) = ⌊(r - r_min)(T - t) / T⌋ + r_min

So noisy times, at which a few photos are learned by heart first, have little capacity. T is 1 here, and t is what the network's
own clock says: training, evaluation and any pipeline's sampler leave out the same ranks at the same noise.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor, nn

from ..config import ConfigError
from .low_precision import LowPrecision, rounded

TIMES = ("timestep", "t")  # what denoisers call the argument
DOWN, UP = "start_A", "start_B"  # buffers of a layer: the factors that it started from
KEY = "rank_schedule"  # of a file's header
TimeOf = Callable[[Tensor], Tensor]  # a denoiser's timestep → t


def least_rank(min_rank: int | None, rank: int) -> int:
    """r_min of a layer of this rank; half of it where nothing is said, as in the paper."""
    return min(max(rank // 2, 1) if min_rank is None else min_rank, rank)


def rank_at(t: Tensor, rank: int, least: int) -> Tensor:
    """r(t) = ⌊(r - r_min)(1 - t)⌋ + r_min of each row [B]; T-LoRA."""
    return ((rank - least) * (1 - t.clamp(0, 1))).floor().long() + least


class RankClock:
    """Knows, while a denoiser runs, which ranks act in each row.

    With gradient checkpointing a block runs again in the backward pass. So the masks of the last forward with gradient stay, and
    a forward without one (a teacher, a sampler) puts them back.

    Args:
        min_rank: r_min, or None: half of a layer's rank.
        time_of: the t of a timestep that the denoiser is called with.
    """

    def __init__(self, min_rank: int | None, time_of: TimeOf):
        self.min_rank, self.time_of = min_rank, time_of
        self.ranks: set[int] = set()
        self.masks: dict[int, Tensor] = {}  # rank → [rows or 1, rank], 1 where a rank acts
        self._kept: list[dict[int, Tensor]] = []

    def watch(self, model: nn.Module) -> None:
        """Read the time of every forward of a denoiser."""
        signature = inspect.signature(type(model).forward)
        name = next(name for name in TIMES if name in signature.parameters)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            said = signature.bind_partial(module, *args, **kwargs).arguments
            timestep = torch.as_tensor(said[name]).detach().reshape(-1)
            device = next((v.device for v in said.values() if isinstance(v, Tensor) and v.ndim > 1), timestep.device)
            self._kept.append(self.masks)
            t = self.time_of(timestep.to(device))
            self.masks = {rank: self._mask(t, rank) for rank in self.ranks}

        def after(*_: Any) -> None:
            masks = self._kept.pop()
            if not torch.is_grad_enabled():
                self.masks = masks

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after, always_call=True)

    def _mask(self, t: Tensor, rank: int) -> Tensor:
        acting = rank_at(t, rank, least_rank(self.min_rank, rank))
        return (torch.arange(rank, device=t.device) < acting[:, None]).float()


class TimedRank(LowPrecision):
    """The branch of a layer whose ranks act by the clock, less the one that it started from, if it keeps that.

    Args:
        rank: r of the schedule.
        copies: how often the schedule's ranks stand in the layer's: twice in an export that holds the start too.
    """

    def __init__(self, rank: int, clock: RankClock | None = None, copies: int = 1):
        self.rank, self.clock, self.copies = rank, clock, copies

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        x = module.lora_dropout[active_adapter](x.to(result.dtype))
        mask = self.clock.masks.get(self.rank) if self.clock else None
        mask = mask.repeat(1, self.copies) if mask is not None else None
        update = _branch(down, x, *rounded(module, down.weight, up.weight, result.dtype), mask)
        if hasattr(module, DOWN):  # the same operations, so that the difference of equal factors is exactly 0
            a, b = (getattr(module, name).to(result.dtype) for name in (DOWN, UP))
            update = update - _branch(down, x, a, b, mask)
        return result + update * module.scaling[active_adapter]


def _branch(down: nn.Module, x: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """B M A x."""
    if isinstance(down, nn.Conv2d):
        hidden = down._conv_forward(x, a, None)  # [B r h w]
        return F.conv2d(hidden if mask is None else hidden * mask[:, :, None, None].to(hidden), b)
    hidden = F.linear(x, a)  # [B … r]
    if mask is not None:
        hidden = hidden * mask.to(hidden).view(len(mask), *(1,) * (hidden.ndim - 2), -1)
    return F.linear(hidden, b)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The model's LoRA layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def follow(model: nn.Module, min_rank: int | None, time_of: TimeOf, ranks: Mapping[str, int]) -> list[str]:
    """Let the LoRA layers of a denoiser act by its time.

    Args:
        ranks: layer → the rank that it was trained with.

    Returns:
        Layers whose rank is another one now, such as those of a resized file; all their ranks act.
    """
    clock, strange = RankClock(min_rank, time_of), []
    for name, layer in layers_of(model).items():
        for adapter, down in layer.lora_A.items():
            has, rank = len(down.weight), ranks[name]
            if has not in (rank, 2 * rank):
                strange.append(name)
                continue
            layer.lora_variant[adapter] = TimedRank(rank, clock, has // rank)
            layer.cast_input_dtype_enabled = False
            clock.ranks.add(rank)
    clock.watch(model)
    return strange


def said(min_rank: int | None, rank: int) -> str:
    """What a file's header tells of the schedule."""
    least = least_rank(min_rank, rank)
    return (
        f"trained as T-LoRA: at time t (1 is noise) the first floor(({rank} - {least}) (1 - t)) + {least} of {rank} ranks acted; "
        "programs that do not know this apply all ranks at all times"
    )


def without_schedule(header: Mapping[str, str]) -> dict[str, str]:
    """The header of a file whose ranks are mixed, by a resize or merge, so that no schedule holds for them."""
    kept = {key: value for key, value in header.items() if key != KEY}
    if "config" in kept:
        text = re.sub(r"(?m)^( +rank_schedule): tlora$", r"\1: none", kept["config"])
        kept["config"] = re.sub(r"(?m)^( +min_rank): \d+$", r"\1: null", text)
    return kept


def with_start(model: nn.Module, layers: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Exported factors s B and A, with the start as further ranks: s (B A - B_0 A_0) = [s B, -s B_0] [A; A_0]."""
    own, made = layers_of(model), {}
    for key, tensor in layers.items():
        name, _, end = key.partition(".lora_")
        start = getattr(own[name], DOWN if end.startswith("A") else UP).detach().cpu()
        made[key] = torch.cat(
            [tensor, start] if end.startswith("A") else [tensor, -scales[name] * start], 0 if end[0] == "A" else 1
        )
    return made


def start_orthogonal(model: nn.Module, adapter: str, seed: int) -> None:
    """Start each LoRA from the tail of a random matrix's singular values, and take that start away again:

        s (B A - B_0 A_0),    A_0 = V_tailᵀ, B_0 = U_tail S_tail of R = U S Vᵀ, R_ij ~ N(0, 1/r²)

    The rows of A_0 and the columns of B_0 are orthogonal, so every rank starts with a direction of its own, whichever act;
    the update is exactly 0. A_0 and B_0 stay as they are. T-LoRA trains S apart; here it is part of B.

    Raises:
        ConfigError: a layer is smaller than its rank.
    """
    for number, (name, layer) in enumerate(layers_of(model).items()):
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        random = np.random.default_rng([seed, number])
        rank, inputs, outputs = len(down), down[0].numel(), len(up)
        if rank > min(inputs, outputs):
            raise ConfigError(
                f"adapter.options.init is ortho_tail, but {name} is {outputs} × {inputs} and its rank {rank}; set adapter.rank, "
                f"or a rank for it in adapter.blocks, to at most {min(inputs, outputs)}"
            )
        a = _orthonormal(inputs, rank, random).T.reshape(down.shape)
        b = (_orthonormal(outputs, rank, random) * tail_values(inputs, outputs, rank, random)).reshape(up.shape)
        for parameter, value, buffer in ((down, a, DOWN), (up, b, UP)):
            parameter.data = value.contiguous().to(parameter)
            layer.register_buffer(buffer, parameter.detach().clone(), persistent=False)
        layer.lora_variant[adapter] = TimedRank(rank)


def _orthonormal(rows: int, columns: int, random: np.random.Generator) -> Tensor:
    """Columns orthonormal, uniform over all such: how the singular vectors of a Gaussian matrix are distributed."""
    q, r = torch.linalg.qr(torch.from_numpy(random.standard_normal((rows, columns), dtype=np.float32)))
    return q * r.diagonal().sign()


def tail_values(inputs: int, outputs: int, rank: int, random: np.random.Generator) -> Tensor:
    """The smallest `rank` singular values of an outputs × inputs matrix of N(0, 1/rank²), falling [rank].

    They are distributed as those of a bidiagonal matrix of χ numbers (Dumitriu & Edelman 2002), whose squares are the eigenvalues
    of a tridiagonal one: milliseconds where the decomposition of a large layer takes seconds.
    """
    large, small = max(inputs, outputs), min(inputs, outputs)
    diagonal = np.sqrt(random.chisquare(np.arange(large, large - small, -1)))
    below = np.sqrt(random.chisquare(np.arange(small - 1, 0, -1)))
    main = diagonal**2
    main[1:] += below**2
    squares = eigvalsh_tridiagonal(main, diagonal[:-1] * below, select="i", select_range=(0, rank - 1))
    return torch.tensor([max(float(square), 0.0) ** 0.5 / rank for square in squares[::-1]])
