"""The random choices of the objective, drawn with the sample: ε and its offset, rollouts, which masks are dropped."""

from __future__ import annotations

import torch
from omegaconf import DictConfig
from torch import Tensor

from .. import draw
from ..draw import Purpose


def noise_draws(cfg: DictConfig, sample: int, shape: tuple[int, ...]) -> Tensor:
    """ε [C h w]: N(0,1), and for a share of the samples one more N(0, o²) number per channel (Guttenberg 2023)."""
    eps = draw.normal(cfg.seed, sample, Purpose.NOISE, shape)
    strength, share = cfg.objective.noise_offset, cfg.objective.noise_offset_probability
    if not strength or draw.uniform(cfg.seed, sample, Purpose.NOISE_OFFSET) >= share:
        return eps
    return eps + strength * draw.normal(cfg.seed, sample, Purpose.OFFSET_VALUE, (shape[0], 1, 1))


def rollout_draws(cfg: DictConfig, samples: list[int]) -> Tensor:
    """Whether each row is rolled out, and over how many steps [B 2]; always drawn, used only if rollout is on."""
    pairs = [draw.generator(cfg.seed, sample, Purpose.ROLLOUT).random(2) for sample in samples]
    return torch.tensor([tuple(pair) for pair in pairs], dtype=torch.float64)


def drop_masks(cfg: DictConfig, samples: list[int], mask: Tensor | None) -> Tensor | None:
    """Masks [B 1 h w], with a share of the rows set to ones (training without a mask)."""
    if mask is None:
        return None
    share = cfg.mask.drop_probability
    dropped = [draw.uniform(cfg.seed, sample, Purpose.MASK_DROP) < share for sample in samples]
    return torch.where(torch.tensor(dropped).view(-1, 1, 1, 1), 1.0, mask)
