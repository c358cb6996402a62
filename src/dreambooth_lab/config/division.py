"""The division of a run over processes."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from .reader import Reader

STRATEGIES = ("auto", "ddp")
WHOLE_WEIGHTS = (
    "each process must hold the whole network for adapters, exports and images; quant=int8, quant=nf4 or model.offload=blocks "
    "make a large one fit one device"
)


def processes(cfg: DictConfig) -> int:
    """Number of training processes on all machines."""
    return int(cfg.trainer.devices * cfg.trainer.num_nodes)


def rows_per_batch(cfg: DictConfig) -> int:
    """Rows of a batch over all processes. The samples of a batch depend only on this number."""
    return int(cfg.dataset.batch_size * processes(cfg))


def rows_per_step(cfg: DictConfig) -> int:
    """Rows of an optimiser step."""
    return int(rows_per_batch(cfg) * cfg.trainer.accumulate_grad_batches)


def problems(read: Reader) -> Iterator[str | None]:
    strategy = read("trainer.strategy")
    if strategy not in (None, *STRATEGIES):
        why = f", which would split the network; {WHOLE_WEIGHTS}" if "fsdp" in strategy or "deepspeed" in strategy else ""
        yield f"trainer.strategy is {strategy!r}{why}; it must be {' or '.join(STRATEGIES)}"
