"""The division of a run over processes."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from .reader import Reader

STRATEGIES = ("auto", "ddp", "fsdp")


def processes(cfg: DictConfig) -> int:
    """Number of training processes on all machines."""
    return int(cfg.trainer.devices * cfg.trainer.num_nodes)


def is_sharded(cfg: DictConfig) -> bool:
    """Whether the processes divide the base model's weights."""
    return bool(cfg.trainer.strategy == "fsdp")


def rows_per_batch(cfg: DictConfig) -> int:
    """Rows of a batch over all processes. The samples of a batch depend only on this number."""
    return int(cfg.dataset.batch_size * processes(cfg))


def rows_per_step(cfg: DictConfig) -> int:
    """Rows of an optimiser step."""
    return int(rows_per_batch(cfg) * cfg.trainer.accumulate_grad_batches)


def problems(read: Reader) -> Iterator[str | None]:
    strategy = read("trainer.strategy")
    if strategy not in (None, *STRATEGIES):
        near = "; fsdp divides frozen weights as ZeRO-3 does" if "deepspeed" in strategy else ""
        yield f"trainer.strategy is {strategy!r}; it must be {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}{near}"
    if strategy == "fsdp" and read("trainer.devices") == 1 and read("trainer.num_nodes") == 1:
        yield "trainer.strategy is fsdp with one process, which has nothing to divide; set trainer.devices, or strategy=auto"
