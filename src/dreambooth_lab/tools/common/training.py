"""What the measuring tools measure: a training run's module and data, made as a run makes them."""

from __future__ import annotations

from omegaconf import DictConfig

from ...data.module import DreamBoothData
from ...dreambooth import DreamBooth
from ...factory import attach, build_adapter, build_family, build_trainable_text


def build_training(cfg: DictConfig) -> tuple[DreamBooth, DreamBoothData]:
    """The module, about to train, and its data, encoded."""
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter, text = build_adapter(cfg), build_trainable_text(cfg, family)
    attach(cfg, family, adapter, text)
    return DreamBooth(cfg, family, adapter, text).train(), data
