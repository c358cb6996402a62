"""Weights divided over processes: gathered to the bit, a part in each process, and no process waits for ever."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dreambooth_lab import lab
from dreambooth_lab.factory import build_family
from dreambooth_lab.models import offload
from dreambooth_lab.models.sharding import Shard, parts

PROCESSES = 2
CPU = torch.device("cpu")


class Layer(nn.Module):
    """A block with frozen weights of two types, and a trainable one added later."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(5, 5), nn.Parameter(torch.rand(3, dtype=torch.float64))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.added * self.scale.sum().float()


class Network(nn.Module):
    _repeated_blocks = ("Layer",)

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = Layer(), Layer()  # not in the order of the forward pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(self.early(x))


def network() -> tuple[Network, offload.Blocks]:
    torch.manual_seed(0)
    model = Network()
    blocks = offload.Blocks(model, CPU)
    for layer in (model.late, model.early):
        layer.added = nn.Parameter(torch.tensor(0.5))
    return model, blocks


def uneven_passes(rank: int) -> None:
    """Between passes with gradient, the first process runs the network 0, 1, 2 times without, the second 3, 0, 1 times."""
    (model, blocks), (whole, _) = network(), network()
    before = sum(blocks.sizes)
    lockstep = blocks.divide(model)
    held = sum(part.nbytes for load in blocks.loads for part in [load.__self__.own])
    assert held <= before / PROCESSES + 2 * 16 * len(blocks.sizes)
    x = torch.full((1, 5), 1.0 + rank)
    for times in ((0, 3), (1, 0), (2, 1)):
        with torch.no_grad():
            for _ in range(times[rank]):
                assert torch.equal(model(x), whole(x))
        ours, theirs = (one(x).sum() for one in (model, whole))
        lockstep.wait()
        for one, loss in ((model, ours), (whole, theirs)):
            one.zero_grad()
            loss.backward()
        assert torch.equal(model.late.added.grad, whole.late.added.grad)
    assert blocks.order == {1: 0, 0: 1}, "in both processes, though one never began with a pass of its own"
    lockstep.wait()


def different_blocks(rank: int) -> None:
    model, blocks = network()
    blocks.divide(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="need different blocks at once"):
        (model.early if rank else model.late)(torch.ones(1, 5))


def started(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    uneven_passes(rank)
    different_blocks(rank)
    dist.destroy_process_group()


def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(started, (port,), PROCESSES)


@pytest.fixture
def alone(tmp_path: Path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["none", "int8", "int4", "fp8", "int8_torchao"])
def test_quantised_weights_are_gathered_to_the_bit(small, kind, alone):

    family = build_family(lab.compose(*small, f"quant={kind}"))
    (block, *_) = offload.repeated(family.denoiser)
    weights = {(block, name): parameter for name, parameter in block.named_parameters()}
    for place, weight in Shard(weights, alone, CPU).gather().items():
        assert type(weight.detach()) is type(weights[place].detach())
        assert all(torch.equal(a, b) for a, b in zip(parts(weight), parts(weights[place]), strict=True))
