"""One training step of a configuration on fake tensors: nothing is loaded, nothing is computed, all is counted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from omegaconf import DictConfig
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...config import ConfigError
from ...dreambooth import DreamBooth
from ...factory import attach, build_adapter, build_family
from ...fake_tensors import fake
from ...models.checkpoint import skip_weights
from ...profiling import memory
from .autocast import Autocast, stock
from .meter import Meter

CAPTION = "a photo of sks dog"


class Step(NamedTuple):
    """What forward and backward of the denoiser cost, gradients included, the optimiser's own step aside."""

    layers: int  # that have an adapter
    frozen: int  # bytes of weights
    learning: int  # parameters
    saved: int  # bytes kept for backward, each storage once, weights aside
    meter: Meter


def analyse(cfg: DictConfig, rows: int, side: int, as_peers: bool = False) -> Step:
    """A step of `rows` images of `side` × `side` px.

    Args:
        as_peers: as diffusers' training scripts run it: float32 factors under autocast.

    Raises:
        ConfigError: the configuration has what can't be analysed.
    """
    _require(cfg)
    with skip_weights():
        family = build_family(cfg)
        family.truncated_part([CAPTION])  # loads tokenizers and schedulers, which need values
    with skip_weights(), fake():
        text = family.read_text([CAPTION], family.text_encoders)
        family.release_encoders()
        adapter = build_adapter(cfg)
        layers = attach(cfg, family, adapter, None)
        module = DreamBooth(cfg, family, adapter)
        if as_peers:
            stock(module)
        cells = side // family.factor
        inputs = memory.probe(module, text, cells, cells, rows)
        saved, meter = _run(module, lambda: module.predict(*inputs), Autocast() if as_peers else nullcontext())
        learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = memory.stored(p for p in module.parameters() if not p.requires_grad)
        return Step(len(layers), frozen, learning, saved, meter)


def _require(cfg: DictConfig) -> None:
    quantised = {key: cfg.quant[key] for key in ("kind",) if cfg.quant[key].value != "none"}
    if quantised:
        raise ConfigError(f"quant.kind is {cfg.quant.kind.value}, whose kernels have no fake tensors; plan with quant=none")
    if cfg.adapter.text_encoders or cfg.adapter.train_token:
        raise ConfigError(
            "adapter.text_encoders or adapter.train_token is set; --plan counts the denoiser's step; leave them out"
        )
    if cfg.model.compile:
        raise ConfigError("model.compile is true; --plan counts operators as they are without it; set it to false")


def _run(module: nn.Module, forward: Callable[[], Tensor], casting: AbstractContextManager[object]) -> tuple[int, Meter]:
    """Forward and backward of the mean squared error; bytes kept between them, and all counts."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    saved = dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    meter = Meter([*module.parameters(), *module.buffers()])
    with meter:
        with saved_tensors_hooks(keep, lambda tensor: tensor), casting:
            loss = forward().float().square().mean((1, 2, 3)).sum()
        loss.backward()
    return sum(saved.values()), meter
