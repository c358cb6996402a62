"""Weights divided over the processes of a run: each process stores an equal part of every block (FSDP's and ZeRO-3's idea).

Only frozen weights are divided. What is trained is small with adapters, so that every process holds all of it (DDP).
torch's `fully_shard` takes no quantised weights, and expects all processes to run the network equally often. Here they don't:
one process may have rows with a rollout, class rows for the teacher, or one more validation image than the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Place = tuple[nn.Module, str]  # the layer that has a parameter, and its name there
ALIGNMENT = 16  # bytes; every tensor of a block begins at a multiple of it
NONE = -1  # instead of a block's number: this process waits


class Lockstep:
    """Makes the processes gather the same blocks in the same order, though they don't run the network equally often.

    Gathering a block is a collective operation. Without gradient, a process announces each block before it gathers it, and
    the processes that `wait` gather along. All processes run the passes with gradient, and these begin when none is still
    in a pass without. They need no announcements, in backward neither.

    Args:
        gather: gathers the block of a number, in a process that does not need it itself.
    """

    def __init__(self, gather: Callable[[int], object]):
        self.gather = gather
        self.gathering = dist.new_group(timeout=timedelta(days=1))  # apart from the all-reduce of gradients
        self.voting = dist.new_group(timeout=timedelta(days=1), backend="gloo")  # on the host: no device synchronisation

    def announce(self, number: int) -> None:
        """This process is about to gather a block.

        Raises:
            RuntimeError: another process announced another one.
        """
        low, high = self._vote(number)
        if low != high:
            raise RuntimeError(f"the processes need different blocks at once, {low} and {high}, so they can't gather weights")

    def wait(self) -> None:
        """Gather along with the processes that are running the network, until all processes wait."""
        while (announced := self._vote(NONE)[1]) != NONE:
            self.gather(announced)

    def _vote(self, number: int) -> tuple[int, int]:
        """The smallest and the largest number that processes announced; `NONE` if all wait."""
        votes = torch.tensor([number, -number if number != NONE else -(2**31)])
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.voting)
        return -int(votes[1]), int(votes[0])


class Shard:
    """This process's part of a block's weights: bytes r/n … (r + 1)/n of all its tensors one after another.

    Args:
        weights: the block's weights, on any device; not changed.
        group: the processes.
        device: where the part is stored, and the gathered weights too.
    """

    def __init__(self, weights: Mapping[Place, nn.Parameter], group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.placeholders = {place: _without_data(weight) for place, weight in weights.items()}
        self.templates = {place: weight.detach().to("meta") for place, weight in weights.items()}
        flat = torch.cat([_bytes(part) for weight in weights.values() for part in parts(weight.detach())])
        each = -(-len(flat) // (group.size() * ALIGNMENT)) * ALIGNMENT
        padded = nn.functional.pad(flat, (0, each * group.size() - len(flat)))
        self.own = padded[each * group.rank() : each * (group.rank() + 1)].to(device, copy=True)

    def gather(self) -> dict[Place, nn.Parameter]:
        """The block's whole weights, from all processes."""
        whole = torch.empty(len(self.own) * self.group.size(), dtype=torch.uint8, device=self.device)
        dist.all_gather_into_tensor(whole, self.own, group=self.group)
        found: dict[Place, nn.Parameter] = {}
        position = 0
        for place, template in self.templates.items():
            weight, position = _rebuilt(template, whole, position)
            found[place] = nn.Parameter(weight, requires_grad=False)
        return found


def parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors of a weight; a quantised one is a wrapper around several."""
    if not is_traceable_wrapper_subclass(weight):
        return [weight]
    return [part for name in weight.__tensor_flatten__()[0] for part in parts(getattr(weight, name))]


def _without_data(weight: Tensor) -> nn.Parameter:
    """A parameter of the same size and type that takes no memory."""
    return nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)


def _bytes(part: Tensor) -> Tensor:
    flat = part.contiguous().view(-1).view(torch.uint8)
    return nn.functional.pad(flat, (0, -len(flat) % ALIGNMENT))


def _rebuilt(template: Tensor, whole: Tensor, position: int) -> tuple[Tensor, int]:
    """A weight like the template from a block's bytes, and the position after it."""
    if not is_traceable_wrapper_subclass(template):
        size = prod(template.shape) * template.itemsize
        part = whole[position : position + size].view(template.dtype).view(template.shape)
        return part, position + size + -size % ALIGNMENT
    names, rest = template.__tensor_flatten__()
    inner: dict[str, Tensor] = {}
    for name in names:
        inner[name], position = _rebuilt(getattr(template, name), whole, position)
    kind: type = type(template)
    return kind.__tensor_unflatten__(inner, rest, template.size(), template.stride()), position
