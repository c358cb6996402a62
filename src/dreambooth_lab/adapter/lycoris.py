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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import ConfigError
from .base import Adapter, Learned, refuse_unknown, swapped

FILE, CONFIG_FILE = "lycoris.safetensors", "lycoris_config.json"
BETWEEN = ":"  # parameter names may hold no dot
SPELLING = {"linear_dim": "lora_dim", "linear_alpha": "alpha", "conv_dim": "conv_lora_dim", "dora_wd": "weight_decompose",
            "wd_on_output": "wd_on_out", "algo": "network_module"}  # fmt: skip
BARE: dict[str, Any] = {
    "enable_conv": True, "target_module": [], "target_name": [], "module_algo_map": {}, "name_algo_map": {},
    "lora_prefix": "lycoris", "use_fnmatch": False, "exclude_name": [],
}  # fmt: skip
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
network, _ = create_lycoris_from_weights(1.0, "{export}/lycoris.safetensors", pipeline.{part})
network.apply_to()"""

    def attach(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        from lycoris import LycorisNetwork
        from lycoris.wrapper import network_module_dict

        logging.getLogger("LyCORIS").setLevel(logging.WARNING)  # importing it sets another
        self.model = model
        arguments, preset = self._arguments(model, learns)
        known = {*SPELLING.values(), *inspect.signature(LycorisNetwork).parameters}
        for algorithm in {arguments["network_module"], "locon"}:
            if algorithm not in network_module_dict:
                raise ConfigError(f"adapter.algorithm is {algorithm!r}; LyCORIS has {', '.join(network_module_dict)}")
            known |= set(inspect.signature(network_module_dict[algorithm]).parameters)
        refuse_unknown(arguments, sorted(known), "LyCORIS")
        with _lock, torch.random.fork_rng(devices=[]):  # presets are globals of the library's class
            torch.manual_seed(seed)
            LycorisNetwork.apply_preset(preset)
            self.network = LycorisNetwork(model, warn_on_unmatched=False, **arguments)
        if not self.network.loras:
            raise ConfigError("the LyCORIS preset matches no layer of the model; see adapter.preset, adapter.targets")
        self.network.apply_to()
        self.network.to(next(model.parameters()).device)
        names = {module: name for name, module in model.named_modules()}
        self.named = {lora.lora_name: names[lora.org_module[0]] for lora in self.network.loras}
        return sorted(self.named.values())

    def _arguments(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The library's arguments and its preset, from our keys or from a file of its own."""
        options = {SPELLING.get(key, key): value for key, value in self.options.items()}
        arguments = {
            "network_module": self.algorithm,
            "lora_dim": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
        } | options
        arguments = {"conv_lora_dim": arguments["lora_dim"], "conv_alpha": arguments["alpha"]} | arguments
        if self.preset and self.preset.endswith(".json"):
            said = json.loads(Path(self.preset).expanduser().read_text(encoding="utf-8"))
            chosen = BARE | said.pop("apply_preset", {"target_module": ["Attention", "FeedForward"]})
            arguments |= {SPELLING.get(key, key): value for key, value in said.items()}
        elif self.preset:
            chosen = BARE | _named(self.preset)
        else:
            layers = self.layers_of(model, learns)
            ranks = self.ranks(layers)
            rules = {layer: {"dim": rank, "alpha": self.alpha * rank / self.rank} for layer, rank in ranks.items()}
            chosen = BARE | {"target_name": layers, "name_algo_map": rules}
        if any(_is_quantised(layer) for layer in model.modules()):
            arguments["bypass_mode"] = True  # W itself is not at hand: add the update's output instead
        return arguments, chosen

    def take(self, path: Path) -> None:
        path = path / FILE if path.is_dir() else path
        saved = load_file(path)
        mine = dict(self.network.named_parameters())
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
        self.network.set_multiplier(strength)

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
        save_file(state, folder / FILE, {"format": "pt", "lycoris_config": json.dumps(self._said()), **learned.header})
        (folder / CONFIG_FILE).write_text(json.dumps(self._said(), indent=2) + "\n", encoding="utf-8")
        return [folder / FILE, folder / CONFIG_FILE]

    def _said(self) -> dict[str, Any]:
        return {
            "algo": self.algorithm, "multiplier": 1.0, "linear_dim": self.rank, "linear_alpha": self.alpha, **self.options,
            "apply_preset": {"target_module": [], "target_name": sorted(self.named.values())},
        }  # fmt: skip


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
