"""LoRA and DoRA, through peft."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..config import ConfigError, enums
from . import kohya, low_precision, peft_layout, timed_rank
from .base import Adapter, ExportWeights, Form, full_name, matching_layers, read_weights, refuse_unknown, target_suffixes
from .files import DIFFUSERS_FILE, SAID, read
from .layouts import refuse_fused
from .peft_layout import NAME

OPTIONS = ("use_rslora", "init_lora_weights")  # options of peft's LoraConfig that don't change the base and can be exported
PEFT_FOLDER = "peft"
log = logging.getLogger(__name__)


class LoRA(Adapter):
    """Low-rank update W + (alpha / rank) B A (Hu et al. 2022), `algorithm` lora; or its direction with a trained magnitude for
    each output (Liu et al. 2024), `algorithm` dora; through peft."""

    def attach(self, model: nn.Module, target_modules: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        self.model, self.text = model, dict[str, nn.Module]()
        return self._inject(model, self.layers_of(model, target_modules), "", seed)

    def attach_text(self, part: str, encoder: nn.Module, target_modules: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        self.text[part] = encoder
        return self._inject(
            encoder, matching_layers(encoder, target_suffixes(self.text_parts, target_modules, "adapter.text_parts")), part, seed
        )

    def _inject(self, model: nn.Module, layers: list[str], part: str, seed: int) -> list[str]:
        from peft import LoraConfig, inject_adapter_in_model

        refuse_unknown(self.options, (*OPTIONS, "init"), "a LoRA of this project")
        options = {name: value for name, value in self.options.items() if name != "init"}
        ranks = self.ranks(layers, part)
        alphas: Any = {layer: self.alpha * rank / self.rank for layer, rank in ranks.items()}  # the same scale at every rank
        alpha: Any = self.alpha  # peft's own type says int
        config = LoraConfig(
            r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=layers, use_dora=self.algorithm == "dora",
            rank_pattern=ranks, alpha_pattern=alphas, **options,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        low_precision.use(model, NAME)
        if self._starts_orthogonal:
            timed_rank.start_orthogonal(model, NAME, seed)
        return [full_name(part, layer) for layer in layers]

    @property
    def _starts_orthogonal(self) -> bool:
        return bool(self.options.get("init") == enums.ORTHO_TAIL)

    def follow_time(self, model: nn.Module, time_of: Callable[[Tensor], Tensor]) -> None:
        if self.rank_schedule is enums.RankSchedule.none:
            return
        layers = list(timed_rank.layers_of(model))
        strange = timed_rank.follow(model, self.min_rank, time_of, dict.fromkeys(layers, self.rank) | self.ranks(layers))
        if strange:
            log.warning("%d layers have another rank than was trained (%s): all their ranks act", len(strange), strange[0])

    def load_weights(self, path: Path) -> None:
        from peft import set_peft_model_state_dict

        if self.algorithm == "lora":
            saved = self._rescaled(path)
        else:
            path = path / DIFFUSERS_FILE if path.is_dir() else path
            saved = read_weights(path)
            self._check_alpha(path)
        parts = {name.partition(".")[0] for name in saved}
        wrong = [f"all of {part}" for part in self.text.keys() - parts]
        for part in parts:
            model = self.text.get(part, self.model)
            own = {name.partition(".")[2]: tensor for name, tensor in saved.items() if name.startswith(part + ".")}
            try:
                result: Any = set_peft_model_state_dict(
                    model, {peft_layout.live_name(n, model): w for n, w in own.items()}, adapter_name=NAME
                )
            except RuntimeError as error:  # sizes
                raise ConfigError(f"adapter.init_from is {str(path)!r}, where {str(error).splitlines()[1].strip()}") from error
            wrong += [*result.unexpected_keys, *(name for name in result.missing_keys if "lora_" in name)]
        if wrong:
            raise ConfigError(
                f"adapter.init_from is {str(path)!r}, where {len(wrong)} weights do not match ({', '.join(wrong[:3])}); use "
                "the same adapter, rank, targets and text encoders"
            )

    def _check_alpha(self, path: Path) -> None:
        """Refuse another alpha: the same weights with another alpha are another update."""
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(SAID, "{}"))
        others = {value for key, value in metadata.items() if key.endswith(".lora_alpha")} - {self.alpha}
        if others:
            raise ConfigError(f"adapter.init_from is {str(path)!r} with alpha {others.pop():g}; set adapter.alpha to it")

    def _rescaled(self, path: Path) -> dict[str, Tensor]:
        """Weights of a file in any layout, with B scaled so that the update is the same with this run's alpha."""
        try:
            found = read(path)
            refuse_fused(found.parts)
        except ConfigError as error:
            raise ConfigError(f"adapter.init_from can't be used: {error}") from error
        if found.assumed:
            log.warning(
                "adapter.init_from: %d layers of %s have no alpha; alpha = rank is assumed, a scale of 1", found.assumed, path
            )
        saved = dict[str, Tensor]()
        for part, layers in found.parts.items():
            model = self.text.get(part, self.model)
            scales = peft_layout.scales(model)
            for name, layer in layers.items():
                scale = layer.scale / scales.get(peft_layout.live_name(name, model), layer.scale)
                saved[f"{part}.{name}.lora_A.weight"] = layer.down.float()
                saved[f"{part}.{name}.lora_B.weight"] = layer.up.float() * scale
        return saved

    def layer_of(self, parameter: str) -> str:
        return parameter.partition(".lora_")[0]

    def load_into(self, pipeline: Any, part: str, path: Path, target_modules: Mapping[str, tuple[str, ...]]) -> None:
        if not hasattr(pipeline, "load_lora_weights"):
            self._take_exported_ranks()
            super().load_into(pipeline, part, path, target_modules)
            return
        try:
            pipeline.load_lora_weights(path)
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{str(path)!r} is not a LoRA that diffusers can load into this model: {reason}") from error

    def set_scale(self, pipeline: Any, strength: float) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if hasattr(pipeline, "set_adapters"):
            pipeline.set_adapters(pipeline.get_active_adapters(), strength)
            return
        tuned: list[Any] = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        for layer in tuned:
            layer.set_scale(NAME, strength)

    @contextmanager
    def weakened(self, model: nn.Module, strength: float) -> Iterator[None]:
        layers = list(timed_rank.layers_of(model).values())
        before = [(layer._disable_adapters, dict(layer.scaling)) for layer in layers]
        for layer in layers:
            layer._disable_adapters = layer._disable_adapters or strength == 0
            layer.scaling.update({name: scale * strength for name, scale in layer.scaling.items()})
        try:
            yield
        finally:
            for layer, (disabled, scales) in zip(layers, before, strict=True):
                layer._disable_adapters = disabled
                layer.scaling.update(scales)

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

    def squared_update(self) -> Tensor:
        models = (self.model, *self.text.values())
        layers = (layer for model in models for layer in timed_rank.layers_of(model).values())
        return torch.stack([squared_update(layer, NAME) for layer in layers]).sum()

    def copies(self, formats: Collection[enums.Format]) -> int:
        return len({enums.Format.diffusers, enums.Format.peft, enums.Format.comfyui} & set(formats))

    def usage(self, part: str, form: Form, kohya: Mapping[str, str]) -> str:
        if next(one for one in form.formats if one is not enums.Format.comfyui) is enums.Format.diffusers:
            return "pipeline.load_lora_weights(export)"
        return f"""\
from peft import PeftModel
pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, export + "/{PEFT_FOLDER}")"""

    def export(self, folder: Path, weights_to_export: ExportWeights) -> dict[Path, str]:
        """`pytorch_lora_weights.safetensors` (diffusers), `peft/` (a folder in it for each text encoder), and for LoRA
        `NAME.safetensors` (ComfyUI, A1111 …). A LoRA's scale is folded into B, so that alpha equals the rank for every reader.

        DoRA gets no file for other programs, because they compute something else: diffusers 0.42 drops the magnitudes of
        kohya's layout, ComfyUI divides by |W| instead of |W + B A|, A1111 uses magnitudes of inputs.
        """
        models = {weights_to_export.part: (self.model, weights_to_export.weights)}
        models |= {part: (encoder, weights_to_export.text[part]) for part, encoder in self.text.items()}
        header, form, files = {"format": "pt", **weights_to_export.header}, weights_to_export.form, dict[Path, str]()
        if self.rank_schedule is not enums.RankSchedule.none:
            header[timed_rank.KEY] = timed_rank.said(self.min_rank, self.rank)
        written = {part: self._written(model, weights) for part, (model, weights) in models.items()}
        inside = {
            part: peft_layout.with_saved_names(layers) if part in self.text else layers for part, (layers, _) in written.items()
        }
        if enums.Format.diffusers in form.formats:
            values = {f"{part}.{key}": value for part, (_, own) in written.items() for key, value in own.items()}
            peft_layout.save(
                folder / DIFFUSERS_FILE, peft_layout.with_part(inside), form, header | {SAID: json.dumps(values, sort_keys=True)}
            )
            files[Path(DIFFUSERS_FILE)] = "diffusers"
        if enums.Format.comfyui in form.formats and self.algorithm == "lora":
            more = kohya.header(self._exported_rank, self._exported_rank)
            peft_layout.save(
                folder / f"{form.name}.safetensors", self._for_programs(inside, weights_to_export), form, header | more
            )
            files[Path(f"{form.name}.safetensors")] = "comfyui"
        if enums.Format.peft in form.formats:
            for part, (layers, values) in written.items():
                peft_layout.write(folder / PEFT_FOLDER / (part if part in self.text else ""), layers, values, form, header)
            files[Path(PEFT_FOLDER)] = "peft"
        return files

    def _written(self, model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights in peft's key layout, and peft's settings; for a LoRA with its scale in B."""
        layers, metadata = peft_layout.layers(model, weights), peft_layout.metadata(model)
        if self.algorithm != "lora":
            return layers, metadata
        scales = peft_layout.scales(model)
        folded = {key: tensor * scales[self.layer_of(key)] if ".lora_B." in key else tensor for key, tensor in layers.items()}
        if self._starts_orthogonal:
            folded = timed_rank.with_start(model, folded, scales)
            patterns = {layer: 2 * rank for layer, rank in metadata["rank_pattern"].items()}
            metadata |= {"r": 2 * metadata["r"], "rank_pattern": patterns}
        alphas = {"lora_alpha": metadata["r"], "alpha_pattern": metadata["rank_pattern"], "use_rslora": False}
        return folded, metadata | alphas

    def _take_exported_ranks(self) -> None:
        """Of an orthogonal start, which files hold as further ranks."""
        if self._starts_orthogonal:
            self.options.pop("init")
            self.blocks = [{**block, "rank": 2 * block["rank"] if block["rank"] else None} for block in self.blocks]
            self.rank, self.alpha = 2 * self.rank, 2 * self.alpha

    @property
    def _exported_rank(self) -> int:
        return 2 * self.rank if self._starts_orthogonal else self.rank

    def _for_programs(self, parts: Mapping[str, Mapping[str, Tensor]], weights_to_export: ExportWeights) -> dict[str, Tensor]:
        """kohya's keys if the family has them, with one alpha, this adapter's rank; else diffusers' keys."""
        if not weights_to_export.kohya:
            return peft_layout.with_part(parts)
        made = dict[str, Tensor]()
        for part, layers in parts.items():
            if part in weights_to_export.kohya:
                ranks = {self.layer_of(key): float(len(tensor)) for key, tensor in layers.items() if ".lora_A." in key}
                made |= kohya.convert(weights_to_export.kohya[part], layers, ranks, self._exported_rank)
        return made


def squared_update(layer: Any, adapter: str) -> Tensor:
    """‖s B A‖² = s² tr(BᵀB · AAᵀ) of a layer, by r × r matrices; less its orthogonal start, if it has one."""
    a, b = layer.lora_A[adapter].weight.float().flatten(1), layer.lora_B[adapter].weight.float().flatten(1)
    if hasattr(layer, timed_rank.DOWN):
        start_a, start_b = (getattr(layer, name).flatten(1) for name in (timed_rank.DOWN, timed_rank.UP))
        a, b = torch.cat([a, start_a]), torch.cat([b, -start_b], 1)
    norm: Tensor = layer.scaling[adapter] ** 2 * ((b.T @ b) * (a @ a.T)).sum()
    return norm
