"""Block offloading: a denoiser's frozen weights are stored in host memory, and copied to the device while their block runs.

diffusers' group offloading can't be trained with: it moves adapters' weights too, and puts a layer's weights back before the
backward pass needs them (convolutions and norms then fail). Here a block's parameters are exchanged for copies on the device
while its forward runs, so tensors saved by autograd stay valid. With gradient checkpointing nothing
is saved in the first pass, so that at most two blocks are on the device at once: the running one and the next.

On CUDA the next block's weights are copied from page-locked memory in a separate stream while this block computes. Instead of
host memory, the weights can be divided over the processes of a run (`divide`; see `sharding`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..config import ConfigError
from .sharding import Lockstep, Place, Shard, parts


class PendingCopy(NamedTuple):
    """A block's weights on the device, or being copied to it."""

    weights: dict[Place, nn.Parameter]
    arrival: torch.cuda.Event | None  # None: the copy is complete


class Blocks:
    """Offloads the weights of a frozen model's repeated blocks.

    Args:
        model: a diffusers model on the host; its other layers are moved to the device.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.order: dict[int, int] = {}  # block → its position in the forward pass, recorded in the first one
        self.last = 0  # position of the block that ran last
        self.coming: tuple[int, PendingCopy] | None = None  # a position, and the copy started ahead of it
        self.lockstep: Lockstep | None = None  # once the weights are divided
        self.homes = [_homes(block) for block in repeated(model)]
        self.sizes = [sum(part.nbytes for home in homes.values() for part in parts(home)) for homes in self.homes]
        self.loads: list[Callable[[], dict[Place, nn.Parameter]]] = [partial(_copies, homes, device) for homes in self.homes]
        number: int
        block: Any
        for number, block in enumerate(repeated(model)):
            block.forward = self._wrapped(block.forward, number)
            for module in block.modules():
                if any(parameter is not None for parameter in module._parameters.values()):
                    module._apply = partial(_stay, module)
        model.to(device)

    def divide(self, model: nn.Module) -> Lockstep:
        """Divide the weights over all processes, which must have called this too, each with a whole model.

        From then on, every process must run the network together with the others; see `Lockstep`.
        """
        self.lockstep = lockstep = Lockstep(self._arrived)
        self.coming = None
        for number, homes in enumerate(self.homes):
            shard = Shard(homes, lockstep.gathering, self.device)
            self.homes[number], self.loads[number] = shard.placeholders, shard.gather
            _place(shard.placeholders)
        model.register_forward_pre_hook(lambda *_: lockstep.wait() if torch.is_grad_enabled() else None)
        return lockstep

    def _wrapped(self, forward: Callable[..., Any], number: int) -> Callable[..., Any]:
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.lockstep and not torch.is_grad_enabled():
                self.lockstep.announce(number)
            _place(self._arrived(number).weights)
            try:
                return forward(*args, **kwargs)
            finally:
                _place(self.homes[number])

        return run

    def _arrived(self, number: int) -> PendingCopy:
        """A block's weights on the device; starts copying those of the block that will probably run next."""
        turn, known = self.order.setdefault(number, len(self.order)), self.coming
        self.coming = None
        mine = known[1] if known and known[0] == turn else self._send(number)
        ahead = 1 if turn > self.last or (turn == 0 and self.last != 1) else -1  # backward passes run in descending order
        self.last = turn
        following = next((block for block, its in self.order.items() if its == turn + ahead), None)
        if self.stream and following is not None:
            self.coming = self.order[following], self._send(following)
        if mine.arrival:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(mine.arrival)
            for weight in mine.weights.values():
                for part in parts(weight):
                    part.record_stream(now)
        return mine

    def _send(self, number: int) -> PendingCopy:
        if not self.stream:
            return PendingCopy(self.loads[number](), None)
        with torch.cuda.stream(self.stream):
            weights = self.loads[number]()
            arrival = torch.cuda.Event()
            arrival.record()
        return PendingCopy(weights, arrival)


def repeated(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a diffusers model.

    Raises:
        ConfigError: its class defines none.
    """
    kind: Any = type(model)
    names = set(kind._repeated_blocks or kind._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"model.offload=blocks and trainer.strategy=fsdp need a network of repeated blocks, which a {kind.__name__} does not "
            "define; set model.offload=none and trainer.strategy=auto"
        )
    return blocks


def _homes(block: nn.Module) -> dict[Place, nn.Parameter]:
    """The host copy of a block's weights: page-locked on machines with CUDA, for asynchronous copies."""
    homes = {}
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                homes[module, name] = _pinned(parameter)
    _place(homes)
    return homes


def _pinned(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_pin(parameter.detach()), requires_grad=False) if torch.cuda.is_available() else parameter


def _pin(tensor: Tensor) -> Tensor:
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.pin_memory()
    names, rest = tensor.__tensor_flatten__()
    inner = {name: _pin(getattr(tensor, name)) for name in names}
    kind: Any = type(tensor)
    return kind.__tensor_unflatten__(inner, rest, tensor.size(), tensor.stride())


def _copies(homes: Mapping[Place, nn.Parameter], device: torch.device) -> dict[Place, nn.Parameter]:
    copied = ((place, home.detach().to(device, non_blocking=True, copy=True)) for place, home in homes.items())
    return {place: nn.Parameter(weight, requires_grad=False) for place, weight in copied}


def _place(weights: Mapping[Place, nn.Parameter]) -> None:
    for (module, name), weight in weights.items():
        module._parameters[name] = weight


def _stay(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replaces `_apply`: a layer's offloaded weights are not moved; everything else is."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, buffer in module._buffers.items():
        module._buffers[name] = buffer if buffer is None else change(buffer)
    return module
