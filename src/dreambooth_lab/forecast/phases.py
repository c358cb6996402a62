"""Device memory of each phase of a run.

The counts exclude the driver and torch's allocator (see `RESERVED`, `SLACK`), and the models of image metrics, which need less
than decoding. With guidance every generated image is two rows.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from omegaconf import DictConfig

from ..config import enums
from . import counts
from .cached_counts import CachedCounts
from .counts import Step, Visit

RESERVED = int(0.6 * 2**30)  # bytes of CUDA's context and libraries
SLACK = 1.05  # the allocator's blocks are larger than the requested sizes
STRIDE = 64  # px

# The keys that the counts depend on.
MODEL = (
    "model._target_", "model.pretrained", "model.revision", "model.variant", "model.config", "model.prediction_type",
    "model.dtype", "model.encoder_dtype", "model.options", "model.empty_caption",
)  # fmt: skip
SAMPLED = (
    *MODEL, "model.attention", "model.offload", "quant.kind", "trainer.strategy", "trainer.devices", "trainer.num_nodes",
)  # fmt: skip


class Need(NamedTuple):
    """Peak device memory of a phase."""

    phase: str
    parts: dict[str, int]  # purpose → bytes

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def least_card(self) -> int:
        """Memory in bytes of the smallest device that fits it."""
        return int(self.total * SLACK) + RESERVED


class Forecast:
    """The phases of a configuration.

    Args:
        known: earlier counts.
    """

    def __init__(self, cfg: DictConfig, known: CachedCounts):
        self.cfg, self.known = cfg, known

    def phases(self) -> list[Need]:
        """The phases, in the order of the run."""
        return [*self._caching(), self._training(), *self._validation()]

    def _caching(self) -> list[Need]:
        prior, edge = self.cfg.prior, _edge(self.cfg)
        drawn = prior.kind.has_class_rows and prior.source is enums.PriorSource.generated
        reading, encoding = self._reading(), self._encoding(edge)
        there = {"denoiser": self._step().base.size} if drawn else {}
        needs = [Need("captions", {"text encoders": reading.weights.size, "reading one": _at_work(reading)})]
        if drawn:
            asked = prior.generated
            needs.append(Need("class images", there | self._drawing(2 * asked.batch_size, asked.resolution)))
        needs.append(Need("images", there | {"VAE": encoding.weights.size, f"encoding {edge}² px": encoding.work}))
        if prior.kind is enums.PriorKind.bank:
            rows, base = prior.bank.batch_size, {"denoiser": self._step().base.size}
            needs.append(Need("bank", base | {f"{rows} × {edge}² px": _at_work(self._sampling(rows, edge))}))
        return needs

    def _training(self) -> Need:
        cfg, step, rows, edge = self.cfg, self._step(), self.cfg.dataset.batch_size, _edge(self.cfg)
        walks = cfg.rollout.enabled and cfg.rollout.kind is enums.RolloutKind.model
        beside = cfg.prior.kind is enums.PriorKind.teacher or cfg.mask.outside is enums.Outside.teacher
        beside = beside or cfg.objective.anchor is enums.Anchor.dco
        beside = beside or bool(cfg.rollout.enabled and cfg.rollout.reflexflow.frequency)
        predicted = self._sampling(rows, edge).work if walks or beside else 0
        work = max(step.work, predicted + (step.kept if beside else 0)) + step.base.at_work
        summed = step.learning if cfg.trainer.accumulate_grad_batches > 1 else 0
        return Need("training", self._resident() | {f"a step of {rows} × {edge}² px": work + summed})

    def _validation(self) -> list[Need]:
        node = self.cfg.validation
        if not (node.every_n_steps or node.every_n_epochs):
            return []
        rows = 2 * min(node.batch_size, node.num_images)
        held = self._resident() | {"gradients": self._step().learning}
        return [Need("validation", held | self._drawing(rows, node.resolution))]

    def _resident(self) -> dict[str, int]:
        """Memory that is allocated during the whole training."""
        step, ema = self._step(), self.cfg.ema
        parts = {
            "denoiser": step.base.size,
            "text encoders": step.encoders,
            "adapter": step.added,
            "optimiser": step.states,
            "average of the weights": step.learning if ema.enabled and ema.device != "cpu" else 0,
        }
        return {what: size for what, size in parts.items() if size}

    def _drawing(self, rows: int, edge: int) -> dict[str, int]:
        """Sampling, or decoding one image after it, whichever needs more."""
        asked, decoded = self._sampling(rows, edge), self._decoding(edge)
        sampling = {f"sampling {rows} rows of {edge}² px": _at_work(asked)}
        showing = {"VAE": decoded.weights.size, f"decoding {edge}² px": decoded.work}
        return max(sampling, showing, key=lambda parts: sum(parts.values()))

    # The counts, each computed once.

    def _reading(self) -> Visit:
        return self.known.count(counts.reading, self.cfg, (*MODEL, "quant"))

    def _encoding(self, edge: int) -> Visit:
        return self.known.count(counts.encoding, self.cfg, (*MODEL, "model.vae_tiling"), edge)

    def _decoding(self, edge: int) -> Visit:
        return self.known.count(counts.decoding, self.cfg, (*MODEL, "model.vae_tiling"), edge)

    def _sampling(self, rows: int, edge: int) -> Visit:
        return self.known.count(counts.sampling, self.cfg, SAMPLED, rows, edge)

    def _step(self) -> Step:
        trained = (*SAMPLED, "model.gradient_checkpointing", "adapter", "optimizer._target_")
        return self.known.count(counts.step, self.cfg, trained, self.cfg.dataset.batch_size, _edge(self.cfg))


def _at_work(visit: Visit) -> int:
    return visit.work + visit.weights.at_work


def _edge(cfg: DictConfig) -> int:
    """Edge of a square with the area of the largest training image, px."""
    data = cfg.dataset
    largest = max(data.resolutions)
    edges = {
        enums.ResolutionType.pixel_area: largest,
        enums.ResolutionType.area: 1024 * largest**0.5,
        enums.ResolutionType.pixel: largest * data.max_aspect**0.5,
    }
    return ceil(edges[data.resolution_type] / STRIDE) * STRIDE
