"""A diffusers pipeline's files: where they are, what its components are, and how one of them is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ConfigError, QuantKind
from ..quant import Quantiser, Source
from . import files

LIBRARIES = ("diffusers", "transformers")  # whose classes a checkpoint may name; code of its own never runs


class Checkpoint:
    """A folder in diffusers' layout, local or from the hub; nothing is loaded until `load`.

    Args:
        pretrained: folder written by save_pretrained, or hub id.
        revision: of a hub id.
        variant: which weight files to fetch and to read.
    """

    def __init__(self, pretrained: str, revision: str | None, variant: str | None):
        self.pretrained, self.variant = pretrained, variant
        self.folder = files.resolve(pretrained, revision, variant)
        self.index = files.read_json(self.folder / "model_index.json")

    @property
    def pipeline_name(self) -> str:
        """The pipeline's class, as `model_index.json` names it."""
        return str(self.index["_class_name"])

    @cached_property
    def parts(self) -> dict[str, type]:
        """Component → its class, in the order of the index; what the checkpoint leaves empty is absent.

        Raises:
            ConfigError: a class is not diffusers' or transformers' own.
        """
        named = {part: said for part, said in self.index.items() if isinstance(said, list) and said[0] is not None}
        return {part: self._kind(part, *said) for part, said in named.items()}

    def _kind(self, part: str, library: str, name: str) -> type:
        import importlib

        kind = getattr(importlib.import_module(library), name, None) if library in LIBRARIES else None
        if kind is None:
            raise ConfigError(
                f"model.pretrained is {self.pretrained!r}, whose {part} is {library}.{name}, which is no class of the installed "
                "diffusers or transformers; code of a checkpoint's own is never run"
            )
        return kind

    def config(self, part: str) -> dict[str, Any]:
        """A component's settings."""
        folder = self.folder / part
        return files.read_json(next(folder / name for name in CONFIGS if (folder / name).is_file()))

    def load(
        self, part: str, dtype: torch.dtype, device: torch.device, quantiser: Quantiser, keeps: Sequence[str]
    ) -> Any:
        """A component, frozen, on its device, in fewer bits if the quantiser is to keep it so.

        Args:
            keeps: components of layer names that quantisation leaves alone.
        """
        kind: Any = self.parts[part]
        folder = self.folder / part
        variant = files.weight_variant(folder, self.variant)
        named = {"torch_dtype" if kind.__module__.startswith("diffusers") else "dtype": dtype}

        def read() -> nn.Module:
            model = kind.from_pretrained(self.folder, subfolder=part, variant=variant, use_safetensors=True, **named)
            return files.settle(model, device)

        source = Source(read, lambda: files.hollow(kind, folder), files.weights(folder, variant), dtype, device)
        return quantiser.load(part, source, keeps)

    def hollow(self, part: str) -> nn.Module:
        """A component's architecture without weights, on the meta device."""
        return files.hollow(self.parts[part], self.folder / part)

    def identity(self, parts: Sequence[str], quantiser: Quantiser, *also: str) -> str:
        """Hash of some components' files, of how they are quantised, and of whatever else is said; loads nothing."""
        kinds = {part: quantiser.kind(part) for part in parts}
        fewer = [f"{part} {kind.value}" for part, kind in kinds.items() if kind is not QuantKind.none]
        return files.identity(self.folder, tuple(part for part in parts if (self.folder / part).is_dir()), *also, *fewer)


CONFIGS = ("config.json", "scheduler_config.json")
