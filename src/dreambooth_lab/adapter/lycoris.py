"""LoCon, LoHa, LoKr and other LyCORIS adapters (Yeh et al. 2024). The only module that imports lycoris."""

from __future__ import annotations

import inspect
import json
import logging
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ConfigError, enums, read_lycoris_file
from .base import Adapter, ExportWeights, Form, read_weights, refuse_unknown, rounded, temporarily_replaced
from .files import PREFIXES

FILE, CONFIG_FILE, PREFIX = "lycoris.safetensors", "lycoris_config.json", "lycoris"
BETWEEN = ":"  # parameter names may not contain a dot
SPELLING = {"linear_dim": "lora_dim", "linear_alpha": "alpha", "conv_dim": "conv_lora_dim", "dora_wd": "weight_decompose",
            "wd_on_output": "wd_on_out", "algo": "network_module"}  # fmt: skip
BARE: dict[str, Any] = {
    "enable_conv": True, "target_module": [], "target_name": [], "module_algo_map": {}, "name_algo_map": {},
    "lora_prefix": PREFIX, "use_fnmatch": False, "exclude_name": [],
}  # fmt: skip
ATTENTION_AND_FEED_FORWARD = {"target_module": ["Attention", "FeedForward"]}  # for a file without targets
BY_FACTORS = ("locon", "loha", "kron")  # modules that compute their update of an output from factors, equal except for rounding
_lock = threading.Lock()


class ExtraModule(nn.Module):
    """A network's raw parameters under separate names. The network itself writes a folded form into state dicts, which can't be
    resumed from. Training and evaluation mode are passed on."""

    def __init__(self, network: nn.Module):
        super().__init__()
        object.__setattr__(self, "network", network)
        for name, parameter in network.named_parameters():
            self.register_parameter(name.replace(".", BETWEEN), parameter)

    def train(self, mode: bool = True) -> ExtraModule:
        self.__dict__["network"].train(mode)
        return super().train(mode)


class Lycoris(Adapter):
    """`algorithm` locon, loha, lokr, diag-oft, boft, glora …; its parameters lie outside the model."""

    @property
    def unread(self) -> Collection[str]:  # type: ignore[override]
        return ("sd-scripts",) if self.algorithm in ("locon", "loha", "lokr") else ("sd-scripts", "InvokeAI")

    def attach(self, model: nn.Module, target_modules: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        from lycoris import LycorisNetwork

        logging.getLogger("LyCORIS").setLevel(logging.WARNING)  # the import changes the level
        names = {module: name for name, module in model.named_modules()}
        self.model = model
        arguments, preset = self._arguments(), self._choice(model, target_modules)
        self.settings = {_library_options(key): value for key, value in arguments.items()} | {"apply_preset": preset}
        _refuse_unknown_layers(arguments, preset)
        if any(_is_quantised(layer) for layer in model.modules()):
            arguments["bypass_mode"] = True  # W is quantised: add the update's output instead
        with _lock, torch.random.fork_rng(devices=[]):  # presets are globals of the library's class
            torch.manual_seed(seed)
            LycorisNetwork.apply_preset(preset)
            self.network = _network(set(names.values()))(model, warn_on_unmatched=False, **arguments)
        if not self.network.loras:
            raise ConfigError(
                f"adapter.preset {self.preset!r} matches no layer of the model; LyCORIS presets name classes of layers"
            )
        for lora in self.network.loras:
            lora.bypass_mode = _adds_outputs(lora)
        self.network.apply_to()
        self.network.to(next(model.parameters()).device)
        self.named = {lora.lora_name: names[lora.org_module[0]] for lora in self.network.loras}
        return sorted(self.named.values())

    def _arguments(self) -> dict[str, Any]:
        """The library's arguments, from our keys or from a LyCORIS file."""
        values: dict[str, Any] = {"algo": self.algorithm, "linear_dim": self.rank, "linear_alpha": self.alpha}
        values |= read_lycoris_file(str(self.preset)) if self._has_file else {"dropout": self.dropout, **self.options}
        values.pop("apply_preset", None)
        arguments = {SPELLING.get(key, key): value for key, value in values.items()}
        return {"conv_lora_dim": arguments["lora_dim"], "conv_alpha": arguments["alpha"]} | arguments

    def _choice(self, model: nn.Module, target_modules: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        """The target layers as a preset of the library; with every key, since it keeps those of the last preset."""
        if self._has_file:
            return BARE | read_lycoris_file(str(self.preset)).get("apply_preset", ATTENTION_AND_FEED_FORWARD)
        if self.preset:
            return BARE | _named(self.preset)
        layers = self.layers_of(model, target_modules)
        ranks = self.ranks(layers)
        rules = {layer: {"dim": rank, "alpha": self.alpha * rank / self.rank} for layer, rank in ranks.items()}
        return BARE | {"target_name": layers, "name_algo_map": rules}

    @property
    def _has_file(self) -> bool:
        return bool(self.preset) and str(self.preset).endswith(".json")

    def load_weights(self, path: Path) -> None:
        path = _file_of(path)
        saved, mine = _library_keys(read_weights(path)), dict(self.network.named_parameters())
        scales = {name: alpha for name, alpha in self.network.state_dict().items() if name.endswith(".alpha")}
        if moved := [
            name for name, alpha in scales.items() if name in saved and not torch.equal(saved[name].float(), alpha.float())
        ]:
            name = moved[0]
            raise ConfigError(
                f"adapter.init_from is {str(path)!r}, whose {name} is {saved[name]:g}, not {scales[name]:g}; set alpha to it"
            )
        absent = [name for name, p in mine.items() if name not in saved or saved[name].shape != p.shape]
        if absent:
            raise ConfigError(
                f"adapter.init_from is {str(path)!r}, where {len(absent)} weights do not match ({', '.join(absent[:3])}); "
                "use the same adapter, rank, options and targets"
            )
        for name, parameter in mine.items():
            parameter.data.copy_(saved[name])

    def extra_module(self) -> nn.Module:
        return ExtraModule(self.network)

    def layer_of(self, parameter: str) -> str:
        return self.named[parameter.split(BETWEEN)[0]]

    def set_scale(self, pipeline: Any, strength: float) -> None:
        trained = self.settings.get("multiplier", 1.0)
        for layer in self.network.loras:
            layer.org_module[0].forward = layer.forward if strength else layer.org_forward
        self.network.set_multiplier(strength * trained)

    @contextmanager
    def weakened(self, model: nn.Module, strength: float) -> Iterator[None]:
        if strength == 0:
            with self.base():
                yield
            return
        before = [layer.multiplier for layer in self.network.loras]
        for layer in self.network.loras:
            layer.multiplier = layer.multiplier * strength
        try:
            yield
        finally:
            for layer, multiplier in zip(self.network.loras, before, strict=True):
                layer.multiplier = multiplier

    @contextmanager
    def base(self) -> Iterator[None]:
        for layer in self.network.loras:  # a multiplier of 0 is not the base model with weight decomposition
            layer.org_module[0].forward = layer.org_forward
        try:
            yield
        finally:
            for layer in self.network.loras:
                layer.org_module[0].forward = layer.forward

    def copies(self, formats: Collection[enums.Format]) -> int:
        return len({enums.Format.comfyui, enums.Format.lycoris} & set(formats))

    def usage(self, part: str, form: Form, kohya: Mapping[str, str]) -> str:
        named = enums.Format.comfyui in form.formats
        file, prefix = (f"{form.name}.safetensors", kohya.get(part, PREFIX)) if named else (FILE, PREFIX)
        return f"""\
from lycoris import LycorisNetwork, create_lycoris_from_weights
LycorisNetwork.apply_preset({{"lora_prefix": "{prefix}"}})
network, _ = create_lycoris_from_weights(1.0, export + "/{file}", pipeline.{part})
network.to(pipeline.{part}.device, pipeline.{part}.dtype)
network.apply_to()"""

    def export(self, folder: Path, weights_to_export: ExportWeights) -> dict[Path, str]:
        """`NAME.safetensors` (ComfyUI, A1111 …), with the denoiser's prefix in kohya's layout if it has
        one; `lycoris.safetensors` with the library's own keys (SimpleTuner); and their `lycoris_config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        own = {name.replace(".", BETWEEN): p for name, p in self.network.named_parameters()}
        with temporarily_replaced(own, weights_to_export.weights):
            state = {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}
        form, files = weights_to_export.form, {Path(CONFIG_FILE): "settings"}
        values = {str(key): value for key, value in self.settings.items()}
        header = {"format": "pt", "lycoris_config": json.dumps(values), **weights_to_export.header, **self._for_sd_scripts()}
        for wanted, name, prefix in (
            (enums.Format.comfyui, f"{form.name}.safetensors", weights_to_export.kohya.get(weights_to_export.part, PREFIX)),
            (enums.Format.lycoris, FILE, PREFIX),
        ):
            if wanted in form.formats:
                named = {prefix + key.removeprefix(PREFIX): tensor for key, tensor in state.items()}
                save_file(rounded(named, form.dtype, name), folder / name, header)
                files[Path(name)] = wanted.value
        (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return files

    def _for_sd_scripts(self) -> dict[str, str]:
        """Header fields by which sd-scripts' tools and A1111 describe a file."""
        named = {key: self.settings[key] for key in ("linear_dim", "linear_alpha") if key in self.settings}
        rest = {key: str(value) for key, value in self.settings.items() if key not in (*named, "apply_preset")}
        return {
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": str(named.get("linear_dim")),
            "ss_network_alpha": f"{named.get('linear_alpha', 1):g}",
            "ss_network_args": json.dumps(rest),
        }


def _file_of(path: Path) -> Path:
    """The weights in an export's folder: the library's own file, or the only one."""
    if not path.is_dir() or (path / FILE).is_file():
        return path / FILE if path.is_dir() else path
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else path / FILE


def _library_keys(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of any exported file, converted to those of the library's network."""
    prefixes = re.compile("|".join(f"^{re.escape(prefix)}_" for prefix in PREFIXES))
    return {prefixes.sub(f"{PREFIX}_", key): tensor for key, tensor in saved.items()}


def _network(names: set[str]) -> type[Any]:
    """The library's network with faster matching. The library matches every target to every layer by a regular expression. Python
    caches 512 compiled ones, so with more targets each match compiles again, a million times for SDXL. Here a target that is a
    layer's name is compared, and any other is compiled once.

    Args:
        names: of all layers of the model.
    """
    from lycoris import LycorisNetwork

    compiled = cache(re.compile)

    class Network(LycorisNetwork):
        def match_fn(self, pattern: str, name: str) -> bool:
            if pattern in names:
                return pattern == name
            return super().match_fn(pattern, name) if self.USE_FNMATCH else bool(compiled(pattern).match(name))

    return Network


def _adds_outputs(lora: Any) -> bool:
    """Whether W x + (ΔW x) by ΔW's factors can replace (W + ΔW) x, which saves each ΔW for backward and rounds W + ΔW to the
    dtype of W. The configuration and the library's own setting take precedence."""
    if lora.bypass_mode is not None or lora.name not in BY_FACTORS:
        return bool(lora.bypass_mode)
    layer = lora.org_module[0]
    return not lora.wd and (isinstance(layer, nn.Linear) or (layer.groups == 1 and set(layer.dilation) == {1}))


def _library_options(key: str) -> str:
    """An argument of the library, spelled as in its files."""
    return next((spelled for spelled, own in SPELLING.items() if own == key), key)


def _refuse_unknown_layers(arguments: Mapping[str, Any], preset: Mapping[str, Any]) -> None:
    """Raise a ConfigError for settings that the library or the algorithm does not know or would drop."""
    from lycoris import LycorisNetwork
    from lycoris.wrapper import network_module_dict

    algorithm = arguments["network_module"]
    if algorithm not in network_module_dict:
        raise ConfigError(f"adapter.algorithm is {algorithm!r}; LyCORIS has {', '.join(network_module_dict)}")
    known = {*inspect.signature(LycorisNetwork).parameters, *inspect.signature(network_module_dict[algorithm]).parameters}
    refuse_unknown(arguments, sorted(known - {"kwargs"}), f"LyCORIS' {algorithm}")
    if strange := preset.keys() - BARE.keys():
        raise ConfigError(f"adapter.preset has {sorted(strange)} in apply_preset; LyCORIS accepts {sorted(BARE)}")


def _named(preset: str) -> dict[str, Any]:
    """One of the library's own presets."""
    from lycoris.config import PRESET

    if preset not in PRESET:
        raise ConfigError(f"adapter.preset is {preset!r}; give a lycoris_config.json, or one of {', '.join(PRESET)}")
    preset_values: Mapping[str, Any] = PRESET[preset]
    keys = {"unet_target_module": "target_module", "unet_target_name": "target_name"}
    renamed = {keys.get(key, key): value for key, value in preset_values.items()}
    return {key: value for key, value in renamed.items() if key in BARE}


def _is_quantised(layer: nn.Module) -> bool:
    weight: Any = getattr(layer, "weight", None)
    plain: Sequence[type] = (Tensor, nn.Parameter)
    return isinstance(layer, nn.Linear) and (type(weight) not in plain or type(weight.data) is not Tensor)
