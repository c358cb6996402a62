"""Training bfloat16 weights: each step is computed in float32 and rounded stochastically.

Rounding to nearest loses every update below half of a weight's last digit, 1/512 of it. Stochastic rounding takes the upper
neighbour with a probability that makes the expected rounded number equal to the number itself
(Gupta et al. 2015), so that small updates add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import draw
from .draw import Purpose

AT_ONCE = 2**26  # weights that are converted to float32 at a time, 512 MB with their gradients
STEPS = "rounded_steps"  # key of the first parameter group: how many steps were rounded


def with_stochastic_rounding(kind: type[Optimizer], seed: int) -> type[Optimizer]:
    """The optimiser class, with steps in float32 for parameters of lower precision; its own state is float32 (or its 8 bits).

    Args:
        kind: an optimiser that updates a parameter from its own gradient and state only, and skips parameters without gradient.
    """
    return type(f"Rounded{kind.__name__}", (_Rounded, kind), {"seed": seed})


class _Rounded(Optimizer):
    seed: int

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        due = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in due:
            p.grad = None
        steps = self.param_groups[0].setdefault(STEPS, 0)
        generators = {p.device: torch.Generator(p.device) for p, _ in due}
        for generator in generators.values():  # the same for all ranks, which must round identically
            generator.manual_seed(draw.torch_seed(self.seed, steps, Purpose.ROUNDING))
        for part in _parts(due):
            low = [p.data for p, _ in part]
            for p, grad in part:
                p.data, p.grad = p.data.float(), grad.float()
            super().step()
            for (p, _), before in zip(part, low, strict=True):
                p.grad = None
                p.data = before.copy_(rounded(p.data, before.dtype, generators[p.device]))
        for p, grad in due:
            p.grad = grad
        self.param_groups[0][STEPS] = steps + 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state with its saved dtype; torch's own method casts it to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            own = self.state.get(p, {})
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and isinstance(own.get(key), Tensor):
                    own[key] = value.to(own[key].device, copy=True)


def _parts(due: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The parameters in order, divided into chunks that fit in float32 at once."""
    part: list[tuple[Tensor, Tensor]] = []
    for pair in due:
        if part and sum(p.numel() for p, _ in part) + pair[0].numel() > AT_ONCE:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def rounded(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 numbers in bfloat16, the upper 16 of their 32 bits, after adding a random number below 2^16, which carries
    with the probability given by the lower 16. float32 targets are not changed."""
    if dtype is torch.float32:
        return x
    noise = torch.randint(0, 1 << 16, x.shape, device=x.device, dtype=torch.int32, generator=generator)
    carried = (x.view(torch.int32) + noise) & -(1 << 16)
    return torch.where(x.isfinite(), carried.view(torch.float32), x).to(dtype)
