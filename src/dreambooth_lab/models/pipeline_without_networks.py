"""A diffusers pipeline without networks: tokenizers, scheduler and configs; networks can be inserted for a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict

from .checkpoint import Checkpoint

NETWORKS = ("unet", "transformer", "vae")  # a pipeline reads their configs also without their weights
COMPONENTS = (
    "tokenizer",
    "text_encoder",
    "safety_checker",
    "feature_extractor",
    "watermarker",
    "image_encoder",
)  # that may be absent
OPTIONS = {"add_watermarker": False, "requires_safety_checker": False}  # of pipelines that have them


def settings(checkpoint: Checkpoint, part: str) -> dict[str, Any]:
    """A component's config, with its class's defaults for missing keys."""
    kind: Any = checkpoint.parts[part]
    config = checkpoint.config(part)
    return _defaults(kind) | config


def _defaults(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def constructor_arguments(kind: Any) -> tuple[str, ...]:
    """Argument names of a pipeline's constructor: components and options."""
    return tuple(name for name in inspect.signature(kind.__init__).parameters if name != "self")


def build(checkpoint: Checkpoint, kind: type, dtype: torch.dtype) -> Any:
    """The pipeline, with config-only objects instead of its networks."""
    names = constructor_arguments(kind)
    made: dict[str, Any] = dict.fromkeys(names, None)
    made |= _defaults(kind)
    made |= {name: value for name, value in checkpoint.index.items() if name in names and not isinstance(value, list)}
    made |= {name: value for name, value in OPTIONS.items() if name in names}
    networks = [part for part in NETWORKS if part in checkpoint.parts]
    for part in checkpoint.parts.keys() & set(names):
        if part.startswith(("tokenizer", "scheduler", "image_noising_scheduler")):
            loaded: Any = checkpoint.parts[part]
            made[part] = loaded.from_pretrained(checkpoint.folder, subfolder=part)
    pipeline: Any = kind(**made | {part: checkpoint.on_meta(part) for part in networks})
    for part in networks:
        vars(pipeline)[part] = config_only(settings(checkpoint, part), dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def config_only(config: Mapping[str, Any], dtype: torch.dtype) -> SimpleNamespace:
    """An object with a network's config and dtype only."""
    return SimpleNamespace(config=FrozenDict(config), dtype=dtype, **{k: v for k, v in config.items() if k == "in_channels"})


@contextmanager
def with_parts(pipeline: Any, **parts: Any) -> Iterator[Any]:
    """A context in which the pipeline has these parts."""
    own = vars(pipeline)
    before = {part: own.get(part) for part in parts}
    own.update(parts)
    try:
        yield pipeline
    finally:
        own.update(before)
