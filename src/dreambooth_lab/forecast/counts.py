"""Memory of the networks, counted on fake tensors: nothing is loaded, nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..batch import Cond
from ..config import enums, is_sharded, processes
from ..dreambooth import DreamBooth
from ..factory import attach, build_adapter, build_family, build_trainable_text
from ..fake_tensors import LiveBytes, fake
from ..models.checkpoint import skip_weights
from ..models.checkpoint_family import CheckpointFamily
from ..optimizer import state_bytes
from ..profiling import memory
from ..quant import bytes_per_weight, layers_to_quantize

CAPTION = "a photo of sks dog"


class Network(NamedTuple):
    """A network's weights, bytes."""

    size: int  # on the device
    written_out: int = 0  # of the largest quantised layer, dequantised for its forward pass
    block: int = 0  # of the largest offloaded or divided block, which is copied one ahead
    away: int = 0  # in host memory

    @property
    def at_work(self) -> int:
        """Device memory besides `size` while it runs, without activations and the running block."""
        return self.written_out + self.block


class Visit(NamedTuple):
    """A network's forward pass without gradient, bytes."""

    weights: Network
    work: int  # peak, without weights


class Step(NamedTuple):
    """Forward and backward of a training step, bytes."""

    base: Network
    encoders: int  # weights of trained text encoders
    added: int  # by the adapter: its own weights, or the copy of the base weights with full fine-tuning
    learning: int  # trainable weights
    states: int  # optimiser state
    kept: int  # saved for backward, after forward
    work: int  # peak, without weights, with gradients


def on_cpu(cfg: DictConfig) -> DictConfig:
    """The same configuration, for a machine without that card."""
    cfg = cfg.copy()
    OmegaConf.update(cfg, "trainer.accelerator", "cpu")
    OmegaConf.update(cfg, "trainer.devices", 1)
    OmegaConf.update(cfg, "trainer.num_nodes", 1)
    return cfg


@contextmanager
def meta_family(cfg: DictConfig) -> Iterator[CheckpointFamily]:
    """A context with a configuration's family without weights, on the CPU; its tensors are fake."""
    with skip_weights():
        family = cast(CheckpointFamily, build_family(on_cpu(cfg)))
        family.shards = processes(cfg) if is_sharded(cfg) else 0  # not those on the CPU
        family.truncated_part([CAPTION])  # loads tokenizers and schedulers, which need real tensors
        with fake():
            yield family


def reading(cfg: DictConfig) -> Visit:
    """The text encoders, and one caption."""
    with meta_family(cfg) as family:
        encoders = [encoder for _, encoder in family.text_encoders]
        sizes = [network(family, part, encoder) for part, encoder in zip(family.text_encoder_parts, encoders, strict=True)]
        whole = Network(sum(size.size for size in sizes), max((size.written_out for size in sizes), default=0))
        return Visit(whole, _peak(encoders, lambda: family.encode_text([CAPTION])))


def encoding(cfg: DictConfig, edge: int) -> Visit:
    """The VAE, and one image."""
    with meta_family(cfg) as family:
        return _through_vae(family, lambda: family.encode_image(torch.zeros(1, 3, edge, edge)))


def decoding(cfg: DictConfig, edge: int) -> Visit:
    """The VAE, and one image's latents."""
    with meta_family(cfg) as family:
        cells = edge // family.factor
        return _through_vae(family, lambda: family.decode(torch.zeros(1, family.channels, cells, cells)))


def _through_vae(family: CheckpointFamily, work: Callable[[], object]) -> Visit:
    vae = family.vae
    return Visit(Network(memory.stored(vae.parameters()) if vae else 0), _peak([vae] if vae else [], work))


def sampling(cfg: DictConfig, rows: int, edge: int) -> Visit:
    """The denoiser, without gradient or adapter, and a number of rows of a square image."""
    with meta_family(cfg) as family:
        text = family.encode_text([CAPTION])
        family.release_encoders()
        cells = edge // family.factor
        inputs = memory.inputs(family, text, cells, cells, rows)
        with torch.no_grad():
            work = _peak([family.denoiser], lambda: family.denoise(*inputs))
        return Visit(network(family, family.denoiser_part, family.denoiser), work)


def step(cfg: DictConfig, rows: int, edge: int) -> Step:
    """A training step of a number of rows of a square image, without rollout and the prior's own forward passes."""
    with meta_family(cfg) as family:
        text = family.encode_text([CAPTION])
        family.release_encoders()
        base = network(family, family.denoiser_part, family.denoiser)
        adapter, learned = build_adapter(cfg), build_trainable_text(cfg, family)
        there = [*family.denoiser.parameters(), *(learned.parameters() if learned else ())]
        encoders = memory.stored(learned.parameters()) if learned else 0
        with LiveBytes(there) as made:
            attach(cfg, family, adapter, learned)
            module = DreamBooth(cfg, family, adapter, learned).train()
            added = made.live
        cells, trains = edge // family.factor, list(module.trainable_parameters().values())
        kept, work = _step(module, memory.inputs(family, text, cells, cells, rows))
        states = state_bytes(cfg.optimizer._target_, trains)
        return Step(base, encoders, added, memory.stored(trains), states, kept, work)


def _step(module: DreamBooth, inputs: tuple[Tensor, Tensor, Cond]) -> tuple[int, int]:
    """Bytes saved for backward, and the peak."""
    x_t, t, cond = inputs
    with LiveBytes([*module.parameters(), *module.buffers()]) as held:
        if module.text:
            cond = cond.replace_rows(torch.arange(len(x_t)), module.text.read([CAPTION] * len(x_t)))
        loss = module.predict(x_t, t, cond).square().mean()
        kept = held.live
        loss.backward()
        return kept, held.peak


def _peak(networks: Sequence[nn.Module], work: Callable[[], object]) -> int:
    """Peak memory in bytes, without the networks' weights."""
    with LiveBytes(tensor for one in networks for tensor in (*one.parameters(), *one.buffers())) as held:
        work()
    return held.peak


def network(family: CheckpointFamily, part: str, model: nn.Module) -> Network:
    """A network's weights with the configured quantisation, before an adapter is attached."""
    kind = family.quantiser.kind(part)
    fewer = (
        {f"{name}.weight" for name in layers_to_quantize(model, family.skip_quantization)[0]}
        if kind is not enums.QuantKind.none
        else set()
    )
    size = {id(p): int(p.numel() * bytes_per_weight(kind)) if name in fewer else p.nbytes for name, p in model.named_parameters()}
    blocks = family.blocks.homes if family.blocks and model is family.denoiser else []
    away = [sum(size.pop(id(home)) for home in homes.values()) for homes in blocks]
    largest = max((p.nbytes for name, p in model.named_parameters() if name in fewer), default=0)
    own = sum(away) // family.shards if family.shards else 0
    return Network(sum(size.values()) + own, largest, max(away, default=0), 0 if family.shards else sum(away))
