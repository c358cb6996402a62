"""LoCon, LoHa, LoKr and their kin (Yeh et al. 2024). The only module that imports lycoris."""

from __future__ import annotations

import inspect
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import ConfigError, read_lycoris_file
from .base import Adapter, Learned, read_weights, refuse_unknown, swapped

FILE, CONFIG_FILE = "lycoris.safetensors", "lycoris_config.json"
BETWEEN = ":"  # parameter names may hold no dot
SPELLING = {"linear_dim": "lora_dim", "linear_alpha": "alpha", "conv_dim": "conv_lora_dim", "dora_wd": "weight_decompose",
            "wd_on_output": "wd_on_out", "algo": "network_module"}  # fmt: skip
BARE: dict[str, Any] = {
    "enable_conv": True, "target_module": [], "target_name": [], "module_algo_map": {}, "name_algo_map": {},
    "lora_prefix": "lycoris", "use_fnmatch": False, "exclude_name": [],
}  # fmt: skip
ATTENTION_AND_FEED_FORWARD = {"target_module": ["Attention", "FeedForward"]}  # of a file that names nothing
_lock = threading.Lock()


class Outside(nn.Module):
    """A network's parameters under names of their own. The network itself writes a folded form into state dicts, which can't be
    resumed from; these are the raw ones. Training and evaluation mode pass through."""

    def __init__(self, network: nn.Module):
        super().__init__()
        object.__setattr__(self, "network", network)
        for name, parameter in network.named_parameters():
            self.register_parameter(name.replace(".", BETWEEN), parameter)

    def train(self, mode: bool = True) -> Outside:
        self.__dict__["network"].train(mode)
        return super().train(mode)


class Lycoris(Adapter):
    """`algorithm` locon, loha, lokr, diag-oft, boft, glora …; its parameters lie outside the model."""

    usage: ClassVar[str] = """\
from diffusers import DiffusionPipeline
from lycoris import create_lycoris_from_weights
pipeline = DiffusionPipeline.from_pretrained("{base}")
network, _ = create_lycoris_from_weights(1.0, export + "/lycoris.safetensors", pipeline.{part})
network.apply_to()"""

    def attach(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        from lycoris import LycorisNetwork

        logging.getLogger("LyCORIS").setLevel(logging.WARNING)  # importing it sets another
        self.model = model
        arguments, preset = self._arguments(), self._choice(model, learns)
        self.said = {_theirs(key): value for key, value in arguments.items()} | {"apply_preset": preset}
        _refuse_strangers(arguments, preset)
        if any(_is_quantised(layer) for layer in model.modules()):
            arguments["bypass_mode"] = True  # W itself is not at hand: add the update's output instead
        with _lock, torch.random.fork_rng(devices=[]):  # presets are globals of the library's class
            torch.manual_seed(seed)
            LycorisNetwork.apply_preset(preset)
            self.network = LycorisNetwork(model, warn_on_unmatched=False, **arguments)
        if not self.network.loras:
            raise ConfigError(
                f"adapter.preset {self.preset!r} matches no layer of the model; LyCORIS names classes of layers there"
            )
        self.network.apply_to()
        self.network.to(next(model.parameters()).device)
        names = {module: name for name, module in model.named_modules()}
        self.named = {lora.lora_name: names[lora.org_module[0]] for lora in self.network.loras}
        return sorted(self.named.values())

    def _arguments(self) -> dict[str, Any]:
        """The library's, from our keys, or from a file of its own in their place."""
        said: dict[str, Any] = {"algo": self.algorithm, "linear_dim": self.rank, "linear_alpha": self.alpha}
        said |= read_lycoris_file(str(self.preset)) if self._has_file else {"dropout": self.dropout, **self.options}
        said.pop("apply_preset", None)
        arguments = {SPELLING.get(key, key): value for key, value in said.items()}
        return {"conv_lora_dim": arguments["lora_dim"], "conv_alpha": arguments["alpha"]} | arguments

    def _choice(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        """Which layers, as the library's presets say it; every key, since it keeps what the last one said."""
        if self._has_file:
            return BARE | read_lycoris_file(str(self.preset)).get("apply_preset", ATTENTION_AND_FEED_FORWARD)
        if self.preset:
            return BARE | _named(self.preset)
        layers = self.layers_of(model, learns)
        ranks = self.ranks(layers)
        rules = {layer: {"dim": rank, "alpha": self.alpha * rank / self.rank} for layer, rank in ranks.items()}
        return BARE | {"target_name": layers, "name_algo_map": rules}

    @property
    def _has_file(self) -> bool:
        return bool(self.preset) and str(self.preset).endswith(".json")

    def take(self, path: Path) -> None:
        path = path / FILE if path.is_dir() else path
        saved, mine = read_weights(path), dict(self.network.named_parameters())
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
                f"adapter.init_from is {str(path)!r}, which does not fit in {len(absent)} weights ({', '.join(absent[:3])}); "
                "use the same adapter, rank, options and targets"
            )
        for name, parameter in mine.items():
            parameter.data.copy_(saved[name])

    def outside(self) -> nn.Module:
        return Outside(self.network)

    def layer_of(self, parameter: str) -> str:
        return self.named[parameter.split(BETWEEN)[0]]

    def strengthen(self, pipeline: Any, strength: float) -> None:
        trained = self.said.get("multiplier", 1.0)
        for layer in self.network.loras:
            layer.org_module[0].forward = layer.forward if strength else layer.org_forward
        self.network.set_multiplier(strength * trained)

    @contextmanager
    def base(self) -> Iterator[None]:
        for layer in self.network.loras:  # a multiplier of 0 is not the base model under weight decomposition
            layer.org_module[0].forward = layer.org_forward
        try:
            yield
        finally:
            for layer in self.network.loras:
                layer.org_module[0].forward = layer.forward

    def export(self, folder: Path, learned: Learned) -> list[Path]:
        """`lycoris.safetensors` (LyCORIS, ComfyUI, SimpleTuner) and the `lycoris_config.json` it was made with."""
        folder.mkdir(parents=True, exist_ok=True)
        own = {name.replace(".", BETWEEN): p for name, p in self.network.named_parameters()}
        with swapped(own, learned.weights):
            state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(state, folder / FILE, {"format": "pt", "lycoris_config": json.dumps(self.said), **learned.header})
        (folder / CONFIG_FILE).write_text(json.dumps(self.said, indent=2) + "\n", encoding="utf-8")
        return [folder / FILE, folder / CONFIG_FILE]


def _theirs(key: str) -> str:
    """An argument of the library as its files spell it."""
    return next((spelled for spelled, own in SPELLING.items() if own == key), key)


def _refuse_strangers(arguments: Mapping[str, Any], preset: Mapping[str, Any]) -> None:
    """Raise a ConfigError for what the library or the algorithm would not know, or would drop."""
    from lycoris import LycorisNetwork
    from lycoris.wrapper import network_module_dict

    algorithm = arguments["network_module"]
    if algorithm not in network_module_dict:
        raise ConfigError(f"adapter.algorithm is {algorithm!r}; LyCORIS has {', '.join(network_module_dict)}")
    known = {*inspect.signature(LycorisNetwork).parameters, *inspect.signature(network_module_dict[algorithm]).parameters}
    refuse_unknown(arguments, sorted(known - {"kwargs"}), f"LyCORIS' {algorithm}")
    if strange := preset.keys() - BARE.keys():
        raise ConfigError(f"adapter.preset has {sorted(strange)} in apply_preset; LyCORIS knows {sorted(BARE)}")


def _named(preset: str) -> dict[str, Any]:
    """One of the library's own presets."""
    from lycoris.config import PRESET

    if preset not in PRESET:
        raise ConfigError(f"adapter.preset is {preset!r}; give a lycoris_config.json, or one of {', '.join(PRESET)}")
    said: Mapping[str, Any] = PRESET[preset]
    keys = {"unet_target_module": "target_module", "unet_target_name": "target_name"}
    renamed = {keys.get(key, key): value for key, value in said.items()}
    return {key: value for key, value in renamed.items() if key in BARE}


def _is_quantised(layer: nn.Module) -> bool:
    weight: Any = getattr(layer, "weight", None)
    plain: Sequence[type] = (Tensor, nn.Parameter)
    return isinstance(layer, nn.Linear) and (type(weight) not in plain or type(weight.data) is not Tensor)
