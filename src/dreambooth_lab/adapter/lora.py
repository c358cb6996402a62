"""LoRA and DoRA. The only module that imports peft."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ConfigError
from . import kohya
from .base import Adapter, refuse_unknown

NAME = "default"  # the one adapter of a run, as diffusers' loader calls it
DIFFUSERS_FILE, KOHYA_FILE, PEFT_FOLDER = "pytorch_lora_weights.safetensors", "kohya.safetensors", "peft"


class LoRA(Adapter):
    """Low-rank update W + (alpha / rank) B A (Hu et al. 2022), `algorithm` lora; or its direction with a learned length for each
    output (Liu et al. 2024), `algorithm` dora; through peft."""

    def attach(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        from peft import LoraConfig, inject_adapter_in_model

        layers = self.layers_of(model, learns)
        refuse_unknown(self.options, [field.name for field in fields(LoraConfig)], "peft's LoraConfig")
        ranks = self.ranks(layers)
        alphas: Any = {layer: self.alpha * rank / self.rank for layer, rank in ranks.items()}  # the same scale at every rank
        alpha: Any = self.alpha  # peft's own type says int
        config = LoraConfig(
            r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=layers, use_dora=self.algorithm == "dora",
            rank_pattern=ranks, alpha_pattern=alphas, **self.options,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.model = model
        if self.init_from:
            self._continue(Path(self.init_from))
        return layers

    def _continue(self, path: Path) -> None:
        from peft import set_peft_model_state_dict

        path = path / DIFFUSERS_FILE if path.is_dir() else path
        saved = {".".join(name.split(".")[1:]): tensor for name, tensor in load_file(path).items()}  # less "unet."
        result: Any = set_peft_model_state_dict(self.model, saved, adapter_name=NAME)
        strange = list(result.unexpected_keys)
        absent = [name for name in result.missing_keys if "lora_" in name]
        if strange or absent:
            raise ConfigError(
                f"adapter.init_from is {str(path)!r}, which does not fit: {len(absent)} weights absent, {len(strange)} too many "
                f"({', '.join((absent + strange)[:3])}); use the same adapter, rank and targets"
            )

    def load_into(self, pipeline: Any, part: str, folder: Path, learns: Mapping[str, tuple[str, ...]]) -> None:
        pipeline.load_lora_weights(folder)

    def strengthen(self, pipeline: Any, strength: float) -> None:
        pipeline.set_adapters(pipeline.get_active_adapters(), strength)

    @contextmanager
    def base(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled

    def layers(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the adapter, by the model's parameter names, in peft's key layout, on the CPU."""
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(self.model, state_dict=dict(weights), adapter_name=NAME)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in layers.items()}

    def metadata(self) -> dict[str, Any]:
        """Rank, alpha and targets as peft writes them; without these a loader assumes alpha = rank."""
        configs: Any = self.model.peft_config
        return {key: sorted(v) if isinstance(v, set) else v for key, v in configs[NAME].to_dict().items()}

    def export(self, folder: Path, weights: Mapping[str, Tensor], part: str, header: Mapping[str, str]) -> list[Path]:
        """`pytorch_lora_weights.safetensors` (diffusers), `peft/`, and for LoRA `kohya.safetensors` (ComfyUI, A1111, sd-scripts).

        DoRA gets no kohya file: diffusers' reading of one does not give the same answer.
        """
        folder.mkdir(parents=True, exist_ok=True)
        layers, said = self.layers(weights), self.metadata()
        prefixed = json.dumps({f"{part}.{key}": value for key, value in said.items()}, sort_keys=True)
        files = [folder / DIFFUSERS_FILE, folder / PEFT_FOLDER / "adapter_model.safetensors"]
        files[1].parent.mkdir(exist_ok=True)
        plain = {"format": "pt", **header}
        save_file({f"{part}.{k}": v for k, v in layers.items()}, files[0], plain | {"lora_adapter_metadata": prefixed})
        save_file({f"base_model.model.{k}": v for k, v in layers.items()}, files[1], plain)
        config = files[1].with_name("adapter_config.json")
        config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if self.algorithm == "lora":
            files.append(folder / KOHYA_FILE)
            save_file(kohya.convert(layers, self._alphas()), files[-1], plain | kohya.header(self.rank, self.alpha))
        return [*files, config]

    def _alphas(self) -> dict[str, float]:
        """Layer → alpha that gives its scale at its rank, whatever option (rslora …) made the scale."""
        from peft.tuners.lora import LoraLayer

        tuned = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}
        return {name: layer.scaling[NAME] * layer.r[NAME] for name, layer in tuned.items()}
