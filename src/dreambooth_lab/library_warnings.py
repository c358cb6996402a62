"""Silence some warnings of libraries. Imports none of them, so it can be called before they load."""

from __future__ import annotations

import logging
import warnings

LOGGERS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "torch.utils._pytree": logging.ERROR,  # how torchao registers its enums
    "torchao": logging.ERROR,  # kernels for other GPUs, and triton; `quant` refuses what can't work
    "bitsandbytes.backends.cpu.ops": logging.ERROR,  # a faster kernel for CPUs that could be installed
}
MESSAGES = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*`torch_dtype` is deprecated.*",  # diffusers 0.42 accepts both names
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)


def silence_libraries() -> None:
    """Silence warnings that don't apply here; warnings about the training itself are shown."""
    for name, level in LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message=message)
