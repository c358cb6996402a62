"""What learns: small trainable parts inside a frozen denoiser. The only module that imports peft."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import ConfigError

NAME = "default"  # the one adapter of a run, as diffusers' loader calls it


class LoRA:
    """Low-rank update W + (alpha / rank) B A of chosen linear layers (Hu et al. 2022), through peft.

    Args:
        rank: r ≥ 1.
        alpha: scale times r.
        dropout: share of the update's inputs dropped in training.
        parts: groups of layers that the model family names.
        targets: endings of layer names instead of `parts`.
    """

    def __init__(self, rank: int, alpha: float, dropout: float, parts: Sequence[str], targets: Sequence[str]):
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.parts, self.targets = list(parts), list(targets)

    def attach(self, model: nn.Module, learns: Mapping[str, tuple[str, ...]], seed: int) -> list[str]:
        """Put fresh adapters (update exactly 0) into a frozen model; float32 whatever the model's dtype.

        Returns:
            The names of the layers that received one.
        """
        from peft import LoraConfig, inject_adapter_in_model

        layers = match(model, self._endings(learns))
        alpha: Any = self.alpha  # peft's own type says int
        config = LoraConfig(r=self.rank, lora_alpha=alpha, lora_dropout=self.dropout, target_modules=layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.model = model
        return layers

    def _endings(self, learns: Mapping[str, tuple[str, ...]]) -> list[str]:
        strangers = [part for part in self.parts if part not in learns]
        if strangers and not self.targets:
            raise ConfigError(f"adapter.parts has {strangers}; this model family names {sorted(learns)}")
        return self.targets or [ending for part in self.parts for ending in learns[part]]

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the model is exactly the base model; after, adapters are as they were."""
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
        return configs[NAME].to_dict()


def match(model: nn.Module, endings: Sequence[str]) -> list[str]:
    """Names of the linear layers that end in any of `endings`, a whole component or more each.

    Raises:
        ConfigError: an ending matches nothing; names the nearest layers.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hits = {end: [name for name in names if name == end or name.endswith("." + end)] for end in endings}
    for end, found in hits.items():
        if not found:
            tails = sorted({".".join(name.split(".")[-end.count(".") - 1 :]) for name in names})
            near = difflib.get_close_matches(end, tails, n=3, cutoff=0.3) or tails[:8]
            raise ConfigError(f"adapter target {end!r} matches no linear layer of the model; near: {', '.join(near)}")
    return sorted({name for found in hits.values() for name in found})
