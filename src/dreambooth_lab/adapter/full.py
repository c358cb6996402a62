"""Full fine-tuning of the model's own weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ConfigError, enums
from .base import Adapter, ExportWeights, Form, read_weights, rounded, temporarily_replaced


class Full(Adapter):
    """Trains every weight of the model, or those of the chosen layers. A frozen copy of them is kept, so that the
    base model's predictions remain exact."""

    kind: ClassVar[str] = ""

    def attach(self, model: nn.Module, target_modules: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        self.model = model
        layers = self.layers_of(model, target_modules) if self.parts or self.targets else [""]
        for layer in layers:
            model.get_submodule(layer).requires_grad_(True)
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.reference = {name: p.detach().clone() for name, p in self.learning.items()}
        return layers if layers != [""] else [n for n, m in model.named_modules() if list(m.parameters(recurse=False))]

    def load_weights(self, path: Path) -> None:
        folders = [path, *(child for child in path.glob("*/") if (child / "training.json").is_file())] if path.is_dir() else []
        path = folders[-1] if folders else path
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        saved = {name: tensor for file in files for name, tensor in read_weights(file).items()}
        absent = [name for name, p in self.learning.items() if name not in saved or saved[name].shape != p.shape]
        if absent:
            raise ConfigError(f"adapter.init_from is {str(path)!r}, which lacks {len(absent)} weights ({', '.join(absent[:3])})")
        for name, parameter in self.learning.items():
            parameter.data.copy_(saved[name])

    def load_into(self, pipeline: Any, part: str, path: Path, target_modules: Mapping[str, tuple[str, ...]]) -> None:
        super().load_into(pipeline, part, path, target_modules)
        self.trained = {name: p.detach().clone() for name, p in self.learning.items()}

    def layer_of(self, parameter: str) -> str:
        return parameter.rpartition(".")[0]

    def set_scale(self, pipeline: Any, strength: float) -> None:
        for name, parameter in self.learning.items():
            parameter.data = torch.lerp(self.reference[name], self.trained[name], strength)

    @contextmanager
    def base(self) -> Iterator[None]:
        with temporarily_replaced(self.learning, self.reference):
            yield

    def squared_update(self) -> Tensor:
        moved = (p.float() - self.reference[name].float() for name, p in self.learning.items())
        return torch.stack([each.square().sum() for each in moved]).sum()

    def copies(self, formats: Collection[enums.Format]) -> int:
        return 1

    def usage(self, part: str, form: Form, kohya: Mapping[str, str]) -> str:
        return f"""\
trained = type(pipeline.{part}).from_pretrained(export, subfolder="{part}", torch_dtype=pipeline.{part}.dtype)
pipeline.register_modules({part}=trained.to(pipeline.{part}.device))"""

    def export(self, folder: Path, weights_to_export: ExportWeights) -> dict[Path, str]:
        """Write the whole denoiser to `PART/`, for diffusers' `from_pretrained`."""
        model: nn.Module = self.model
        save = model.save_pretrained
        assert callable(save)
        with temporarily_replaced(self.learning, weights_to_export.weights):
            save(folder / weights_to_export.part, safe_serialization=True)
        for file in sorted((folder / weights_to_export.part).glob("*.safetensors")):
            save_file(
                rounded(load_file(file), weights_to_export.form.dtype, file.name),
                file,
                {"format": "pt", **weights_to_export.header},
            )
        note = folder / weights_to_export.part / "training.json"
        note.write_text(json.dumps(dict(weights_to_export.header), indent=2) + "\n", encoding="utf-8")
        return {Path(weights_to_export.part): "weights"}
