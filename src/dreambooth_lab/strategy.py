"""How several processes train together: Lightning's DDP, with the frozen weights whole or divided over the processes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, cast

from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .config import is_sharded, processes
from .dreambooth import DreamBooth
from .models.sharding import Lockstep


def build_strategy(cfg: DictConfig) -> Strategy | str:
    """With several devices, one process per device, each with its own rows of every batch; gradients are averaged."""
    if processes(cfg) == 1 and cfg.trainer.strategy == "auto":
        return "auto"
    kind = ShardedBase if is_sharded(cfg) else TrainableOnly
    return kind(
        find_unused_parameters=bool(cfg.adapter.train_token or cfg.adapter.text_encoders),  # a rank's captions may lack the token
        init_sync=False, forward_sync_buffers=False,  # all ranks initialise the same weights from the seed
        timeout=timedelta(days=1),  # the other ranks wait while the first scores images and writes
    )  # fmt: skip


class TrainableOnly(DDPStrategy):
    """DDP that leaves frozen weights alone: they may be in host memory, or divided."""

    def configure_ddp(self) -> None:
        module = cast(DreamBooth, self.lightning_module)
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        super().configure_ddp()


class ShardedBase(TrainableOnly):
    """The blocks of the frozen base model are divided over the processes, which gather one block at a time to run it.

    Before each collective operation of its own, a process waits until no other one runs the network any more.
    """

    lockstep: Lockstep | None = None

    def configure_ddp(self) -> None:
        self.lockstep = cast(DreamBooth, self.lightning_module).family.shard()
        super().configure_ddp()

    def _wait(self) -> None:
        if self.lockstep:
            self.lockstep.wait()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._wait()
        return super().training_step(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        self._wait()
        super().pre_backward(closure_loss)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._wait()
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self._wait()
        return super().broadcast(obj, src)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        self._wait()
        return super().reduce(*args, **kwargs)

    def on_train_end(self) -> None:
        self._wait()
        super().on_train_end()
