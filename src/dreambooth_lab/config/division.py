"""How a run is divided over processes."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from .reader import Reader

STRATEGIES = ("auto", "ddp")
WHOLE_WEIGHTS = (
    "adapters, exports and images need each process to hold the whole network; quant=int8, quant=nf4 or model.offload=blocks "
    "make a large one fit one device"
)


def processes(cfg: DictConfig) -> int:
    """Processes that train together, of all machines."""
    return int(cfg.trainer.devices * cfg.trainer.num_nodes)


def rows_per_batch(cfg: DictConfig) -> int:
    """Rows that all processes together take at once. Which samples a batch has depends on this number alone."""
    return int(cfg.dataset.batch_size * processes(cfg))


def rows_per_step(cfg: DictConfig) -> int:
    """Rows of an optimiser step."""
    return int(rows_per_batch(cfg) * cfg.trainer.accumulate_grad_batches)


def problems(read: Reader) -> Iterator[str | None]:
    strategy = read("trainer.strategy")
    if strategy not in (None, *STRATEGIES):
        why = f", which would split the network; {WHOLE_WEIGHTS}" if "fsdp" in strategy or "deepspeed" in strategy else ""
        yield f"trainer.strategy is {strategy!r}{why}; it must be {' or '.join(STRATEGIES)}"
