"""A training run's module and data for the benchmarks, built as in a run."""

from __future__ import annotations

from omegaconf import DictConfig

from ...data.module import DreamBoothData
from ...dreambooth import DreamBooth
from ...factory import attach, build_adapter, build_family, build_trainable_text


def build_training(cfg: DictConfig) -> tuple[DreamBooth, DreamBoothData]:
    """The module, ready to train, and its encoded data."""
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter, text = build_adapter(cfg), build_trainable_text(cfg, family)
    attach(cfg, family, adapter, text)
    return DreamBooth(cfg, family, adapter, text).train(), data
