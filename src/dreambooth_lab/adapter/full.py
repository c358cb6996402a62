"""Full-rank training: the model's own weights learn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..config import ConfigError
from .base import Adapter, Learned, read_weights, swapped


class Full(Adapter):
    """Every weight of the model learns, or those of the chosen layers. A frozen copy of them stays beside the model, so that the
    base model can still be asked exactly."""

    usage: ClassVar[str] = """\
from diffusers import AutoModel, DiffusionPipeline
trained = AutoModel.from_pretrained(export, subfolder="{part}")
pipeline = DiffusionPipeline.from_pretrained("{base}", {part}=trained)"""

    def attach(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        self.model = model
        layers = self.layers_of(model, learns) if self.parts or self.targets else [""]
        for layer in layers:
            model.get_submodule(layer).requires_grad_(True)
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        low = {str(p.dtype) for p in self.learning.values() if p.dtype is not torch.float32}
        if low:
            raise ConfigError(
                f"adapter=full trains weights in {', '.join(low)}, which loses small updates; set model.dtype=float32"
            )
        self.reference = {name: p.detach().clone() for name, p in self.learning.items()}
        return layers if layers != [""] else [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]

    def take(self, path: Path) -> None:
        folders = [path, *(child for child in path.glob("*/") if (child / "training.json").is_file())] if path.is_dir() else []
        path = folders[-1] if folders else path
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        saved = {name: tensor for file in files for name, tensor in read_weights(file).items()}
        absent = [name for name, p in self.learning.items() if name not in saved or saved[name].shape != p.shape]
        if absent:
            raise ConfigError(f"adapter.init_from is {str(path)!r}, which lacks {len(absent)} weights ({', '.join(absent[:3])})")
        for name, parameter in self.learning.items():
            parameter.data.copy_(saved[name])

    def load_into(self, pipeline: Any, part: str, path: Path, learns: Mapping[str, tuple[str, ...]]) -> None:
        super().load_into(pipeline, part, path, learns)
        self.trained = {name: p.detach().clone() for name, p in self.learning.items()}

    def layer_of(self, parameter: str) -> str:
        return parameter.rpartition(".")[0]

    def strengthen(self, pipeline: Any, strength: float) -> None:
        for name, parameter in self.learning.items():
            parameter.data = torch.lerp(self.reference[name], self.trained[name], strength)

    @contextmanager
    def base(self) -> Iterator[None]:
        with swapped(self.learning, self.reference):
            yield

    def export(self, folder: Path, learned: Learned) -> list[Path]:
        """The whole denoiser as diffusers' `from_pretrained` reads it, in `PART/`."""
        model: nn.Module = self.model
        save = model.save_pretrained
        assert callable(save)
        with swapped(self.learning, learned.weights):
            save(folder / learned.part, safe_serialization=True)
        files = sorted((folder / learned.part).glob("*.safetensors"))
        for file in files:
            save_file(load_file(file), file, {"format": "pt", **learned.header})
        note = folder / learned.part / "training.json"
        note.write_text(json.dumps(dict(learned.header), indent=2) + "\n", encoding="utf-8")
        return [*files, note]
