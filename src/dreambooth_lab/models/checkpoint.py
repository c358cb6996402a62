"""A diffusers pipeline's files: their location, the components, and how a component is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ConfigError, enums
from ..quant import Quantiser, Source
from ..storage.digests import digest
from . import files, meta_init, single_file, weights

OUTLINE = ContextVar("outline", default=False)  # see `skip_weights`
LIBRARIES = ("diffusers", "transformers")  # a checkpoint may name only their classes; its own code is never run
CONFIGS = ("config.json", "scheduler_config.json")


def without_weights() -> bool:
    """Whether checkpoints are read without weights now."""
    return OUTLINE.get()


@contextmanager
def skip_weights() -> Iterator[None]:
    """A context in which checkpoints are read without weights: networks are created from their configs, without values. Under a
    `FakeTensorMode` they take no memory."""
    token = OUTLINE.set(True)
    try:
        yield
    finally:
        OUTLINE.reset(token)


class Checkpoint:
    """A folder in diffusers' layout, local or from the hub; nothing is loaded until `load`.

    Args:
        pretrained: folder written by save_pretrained, hub id, or a single .safetensors file.
        revision: of a hub id.
        variant: which weight files to download and read; auto takes fp16 if they exist, None the plain ones.
        cache: folder that caches files' hashes; None: they are computed at every start. Single files are
            converted into it.
        config: for a single file: folder or hub id with its configs and tokenizers.
        prediction: for a single file: its prediction type, if the file does not state it.

    Raises:
        ConfigError: a file that a load needs is missing, or is of an unsupported kind.
    """

    def __init__(
        self, pretrained: str, revision: str | None, variant: str | None, cache: Path | None = None,
        config: str | None = None, prediction: enums.Prediction | None = None,
    ):  # fmt: skip
        self.pretrained, self.variant, self.cache = pretrained, variant, cache
        self.named = f"model.pretrained is {pretrained!r}, which"
        self.folder = self._folder(revision, config, prediction)
        self.index = weights.read_json(self.folder / "model_index.json", self.named)
        self._require_settings()
        networks = [part for part, kind in self.parts.items() if issubclass(kind, nn.Module)]
        for part in networks:
            self.config(part)
        if not OUTLINE.get():
            self.weights = {part: weights.read(self.folder / part, self.variant, self._described(part)) for part in networks}
            self._require_variant()

    def _folder(self, revision: str | None, config: str | None, prediction: enums.Prediction | None) -> Path:
        if single_file.is_single_file(self.pretrained):
            self.variant = None  # converted files are plain
            return single_file.convert(self.pretrained, config, prediction, self.cache)
        for key, value in (("config", config), ("prediction_type", prediction and prediction.value)):
            if value is not None:
                raise ConfigError(
                    f"model.{key} is {value!r}, but model.pretrained is {self.pretrained!r}, which is not a single file and "
                    f"has its own; "
                    f"set model.{key}=null"
                )
        return files.resolve(self.pretrained, revision, self.variant)

    def _described(self, part: str) -> str:
        return f"model.pretrained is {self.pretrained!r}, whose {part}"

    def _require_settings(self) -> None:
        """Refuse components that are outside the folder, missing, or without a readable config."""
        if not isinstance(self.index.get("_class_name"), str):
            raise ConfigError(f"{self.named} has a model_index.json that names no pipeline class; {files.WAY_OUT}")
        for part in weights.named(self.index):
            if not weights.plain(part):
                raise ConfigError(f"{self.named} names a component {part!r} in model_index.json, which is not a plain name")
            folder = self.folder / part
            if not folder.is_dir():
                raise ConfigError(f"{self.named} has no folder {part}, which model_index.json names; download it again")
            for path in sorted(folder.glob("*config.json")):
                weights.read_json(path, self._described(part))

    def _require_variant(self) -> None:
        """Refuse a requested variant that does not exist."""
        if self.variant in (None, weights.AUTO) or self.read_variant:
            return
        raise ConfigError(
            f"model.variant is {self.variant!r}, but {self.pretrained} has no such weights; set model.variant=auto for fp16 "
            "if it exists, or model.variant=null for the plain files"
        )

    @property
    def read_variant(self) -> str | None:
        """The variant of at least one component; the others have plain files."""
        return next((found.variant for found in self.weights.values() if found.variant), None)

    @property
    def pipeline_name(self) -> str:
        """The pipeline's class, as `model_index.json` names it."""
        return str(self.index["_class_name"])

    @cached_property
    def parts(self) -> dict[str, type]:
        """Component → its class, in the order of the index.

        Raises:
            ConfigError: a class is not diffusers' or transformers' own.
        """
        return {part: self._kind(part, *text) for part, text in weights.named(self.index).items()}

    def _kind(self, part: str, library: str, name: str) -> type:
        import importlib

        kind = getattr(importlib.import_module(library), str(name), None) if library in LIBRARIES else None
        if kind is None:
            raise ConfigError(
                f"model.pretrained is {self.pretrained!r}, whose {part} is {library}.{name}, which is not in the installed "
                "diffusers or transformers; custom code of a checkpoint is never run"
            )
        return kind

    def config(self, part: str) -> dict[str, Any]:
        """A component's settings."""
        folder = self.folder / part
        path = next((folder / name for name in CONFIGS if (folder / name).is_file()), folder / CONFIGS[0])
        return weights.read_json(path, self._described(part))

    def load(self, part: str, dtype: torch.dtype, device: torch.device, quantiser: Quantiser, skip: Sequence[str]) -> Any:
        """A frozen component on its device, quantised if configured.

        Args:
            keeps: components of layer names that are not quantised.
        """
        kind: Any = self.parts[part]
        folder = self.folder / part
        if OUTLINE.get():
            return meta_init.allocated(kind, folder, dtype, device)
        variant, shards, table = self.weights[part]
        named = {"torch_dtype" if kind.__module__.startswith("diffusers") else "dtype": dtype}

        def read(where: torch.device) -> nn.Module:
            model = kind.from_pretrained(self.folder, subfolder=part, variant=variant, use_safetensors=True, **named)
            return files.freeze_to(model, where)

        decide = (folder / "config.json", *([table] if table else []), *shards)
        bones = partial(meta_init.build, kind, folder, dtype)
        source = Source(read, partial(files.on_meta, kind, folder), decide, dtype, device, self.cache, bones)
        return quantiser.load(part, source, skip)

    def on_meta(self, part: str) -> nn.Module:
        """A component's architecture without weights, on the meta device."""
        return files.on_meta(self.parts[part], self.folder / part)

    def identity(self, parts: Sequence[str], quantiser: Quantiser, *also: str) -> str:
        """Hash of some components' files, their quantisation, and further strings; loads nothing."""
        kinds = {part: quantiser.kind(part) for part in parts}
        fewer = [f"{part} {kind.value}" for part, kind in kinds.items() if kind is not enums.QuantKind.none]
        whole = hashlib.sha256("\0".join((*also, *fewer)).encode())
        for file in (file for part in parts for file in self._read(part)):
            whole.update(f"{file.parent.name}/{file.name}\0".encode())
            whole.update(bytes.fromhex(digest(file, self.cache)))
        return whole.hexdigest()

    def _read(self, part: str) -> list[Path]:
        """The files of a component that a load reads, in order of their names."""
        folder, found = self.folder / part, self.weights.get(part)
        if not folder.is_dir():
            return []
        small = {path for path in folder.iterdir() if path.suffix in weights.SMALL and ".index." not in path.name}
        if found:
            small |= {*found.files, *([found.table] if found.table else [])}
        return sorted(small)
