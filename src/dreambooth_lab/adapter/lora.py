"""LoRA and DoRA. The only module that imports peft."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ConfigError
from . import kohya
from .base import Adapter, Learned, endings, match, named, read_weights, refuse_unknown

OPTIONS = ("use_rslora", "init_lora_weights")  # of peft's LoraConfig: what leaves the base alone and exports whole
NAME = "default"  # the one adapter of a run, as diffusers' loader calls it
DIFFUSERS_FILE, KOHYA_FILE, PEFT_FOLDER = "pytorch_lora_weights.safetensors", "kohya.safetensors", "peft"


class LoRA(Adapter):
    """Low-rank update W + (alpha / rank) B A (Hu et al. 2022), `algorithm` lora; or its direction with a learned length for each
    output (Liu et al. 2024), `algorithm` dora; through peft."""

    usage: ClassVar[str] = """\
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights(export)"""

    def attach(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        self.model, self.text = model, dict[str, nn.Module]()
        return self._inject(model, self.layers_of(model, learns), "", seed)

    def attach_text(self, part: str, encoder: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        self.text[part] = encoder
        return self._inject(encoder, match(encoder, endings(self.text_parts, learns, "adapter.text_parts")), part, seed)

    def _inject(self, model: nn.Module, layers: list[str], part: str, seed: int) -> list[str]:
        from peft import LoraConfig, inject_adapter_in_model

        refuse_unknown(self.options, OPTIONS, "a LoRA of this project")
        ranks = self.ranks(layers, part)
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
        return [named(part, layer) for layer in layers]

    def take(self, path: Path) -> None:
        from peft import set_peft_model_state_dict

        path = path / DIFFUSERS_FILE if path.is_dir() else path
        saved = read_weights(path)
        self._check_alpha(path)
        parts = {name.partition(".")[0] for name in saved}
        wrong = [f"all of {part}" for part in self.text.keys() - parts]
        for part in parts:
            model = self.text.get(part, self.model)
            own = {name.partition(".")[2]: tensor for name, tensor in saved.items() if name.startswith(part + ".")}
            try:
                result: Any = set_peft_model_state_dict(model, {_live(n, model): w for n, w in own.items()}, adapter_name=NAME)
            except RuntimeError as error:  # sizes
                raise ConfigError(f"adapter.init_from is {str(path)!r}, where {str(error).splitlines()[1].strip()}") from error
            wrong += [*result.unexpected_keys, *(name for name in result.missing_keys if "lora_" in name)]
        if wrong:
            raise ConfigError(
                f"adapter.init_from is {str(path)!r}, which does not fit in {len(wrong)} weights ({', '.join(wrong[:3])}); use "
                "the same adapter, rank, targets and text encoders"
            )

    def _check_alpha(self, path: Path) -> None:
        """The same weights under another alpha are another update."""
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        others = {value for key, value in said.items() if key.endswith(".lora_alpha")} - {self.alpha}
        if others:
            raise ConfigError(f"adapter.init_from is {str(path)!r} with alpha {others.pop():g}; set adapter.alpha to it")

    def layer_of(self, parameter: str) -> str:
        return parameter.partition(".lora_")[0]

    def load_into(self, pipeline: Any, part: str, path: Path, learns: Mapping[str, tuple[str, ...]]) -> None:
        if not hasattr(pipeline, "load_lora_weights"):
            super().load_into(pipeline, part, path, learns)
            return
        try:
            pipeline.load_lora_weights(path)
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{str(path)!r} is no LoRA that diffusers can put on this model: {reason}") from error

    def strengthen(self, pipeline: Any, strength: float) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if hasattr(pipeline, "set_adapters"):
            pipeline.set_adapters(pipeline.get_active_adapters(), strength)
            return
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_scale(NAME, strength)

    @contextmanager
    def base(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        models = (self.model, *self.text.values())
        layers = [layer for model in models for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled

    def export(self, folder: Path, learned: Learned) -> list[Path]:
        """`pytorch_lora_weights.safetensors` (diffusers), `peft/` (a folder in it for each text encoder), and for LoRA
        `kohya.safetensors` (ComfyUI, A1111).

        DoRA gets no kohya file, because who reads one computes something else: diffusers 0.42 drops the lengths, ComfyUI divides
        by |W| rather than |W + B A|, A1111 takes lengths of inputs.
        """
        models = {learned.part: (self.model, learned.weights)}
        models |= {part: (encoder, learned.text[part]) for part, encoder in self.text.items()}
        plain = {"format": "pt", **learned.header}
        diffusers, said, as_kohya, files = dict[str, Tensor](), dict[str, Any](), dict[str, Tensor](), list[Path]()
        for part, (model, weights) in models.items():
            layers = _layers(model, weights)
            is_text = part in self.text
            outside = {_saved(name) if is_text else name: tensor for name, tensor in layers.items()}
            diffusers |= {f"{part}.{name}": tensor for name, tensor in outside.items()}
            said |= {f"{part}.{key}": value for key, value in _metadata(model).items()}
            files += _write_peft(folder / PEFT_FOLDER / (part if is_text else ""), layers, _metadata(model), plain)
            if self.algorithm == "lora" and part in learned.kohya:
                alphas = {_saved(name) if is_text else name: alpha for name, alpha in _alphas(model).items()}
                as_kohya |= kohya.convert(learned.kohya[part], outside, alphas)
        save_file(diffusers, folder / DIFFUSERS_FILE, plain | {"lora_adapter_metadata": json.dumps(said, sort_keys=True)})
        if as_kohya:
            save_file(as_kohya, folder / KOHYA_FILE, plain | kohya.header(self.rank, self.alpha))
            files.append(folder / KOHYA_FILE)
        return [folder / DIFFUSERS_FILE, *files]


LENGTHS = ".lora_magnitude_vector"  # DoRA's, which transformers looks for by the name of the parameter in them
CLIP = "text_model."  # begins names of CLIP's text encoders in files; transformers 5 dropped it from one class


def _saved(name: str) -> str:
    """Name of a text encoder's layer or parameter as diffusers' file has it, whatever version of transformers reads it."""
    name = name + ".weight" if name.endswith(LENGTHS) else name
    return name if name.startswith(CLIP) else CLIP + name


def _live(name: str, model: nn.Module) -> str:
    """And back, as this model has it."""
    name = name.removesuffix(".weight") if name.endswith(LENGTHS + ".weight") else name
    has = any(own.startswith(CLIP) for own, _ in model.named_modules())
    return name if has else name.removeprefix(CLIP)


def _layers(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the adapter, by the model's parameter names, in peft's key layout, on the CPU."""
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model, state_dict=dict(weights), adapter_name=NAME)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in layers.items()}


def _metadata(model: Any) -> dict[str, Any]:
    """Rank, alpha and targets as peft writes them; without these a loader assumes alpha = rank."""
    return {key: sorted(v) if isinstance(v, set) else v for key, v in model.peft_config[NAME].to_dict().items()}


def _write_peft(folder: Path, layers: Mapping[str, Tensor], said: Mapping[str, Any], header: dict[str, str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file({f"base_model.model.{name}": tensor for name, tensor in layers.items()}, file, header)
    config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [file, config]


def _alphas(model: nn.Module) -> dict[str, float]:
    """Layer → alpha that gives its scale at its rank, whatever option (rslora …) made the scale."""
    from peft.tuners.lora import LoraLayer

    tuned = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layer.scaling[NAME] * layer.r[NAME] for name, layer in tuned.items()}
