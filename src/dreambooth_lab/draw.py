"""Counter-based random draws: (seed, index, purpose) → values, with no state in between.

Every random choice of a training sample comes from here, before any forward pass. So a draw does not depend on its
batch, its worker, the number of ranks, or on earlier draws: a resumed run, a run at another
batch size and two jobs of a sweep all use the same noise for sample n.

The generator is Philox (Salmon et al. 2011): its key is (seed, purpose), its counter starts at the index.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a draw decides. Values are part of the format: append, never renumber."""

    ORDER = 1  # the order of the images
    BATCHES = 2  # the order of the buckets
    CAPTION_DROPOUT = 3
    VARIANT = 4  # which cached crop, mirrored or not
    CROP = 5  # the position of a cached crop
    TIME = 6
    NOISE = 7
    POSTERIOR = 8  # the VAE posterior's own noise
    ADAPTER_INIT = 9
    STEP = 10  # torch's global generator during one step (adapter dropout)
    ROLLOUT = 11  # whether a row rolls out, and how far
    PERTURBATION = 12  # ξ of input perturbation
    NOISE_OFFSET = 13  # whether ε has an offset
    OFFSET_VALUE = 14  # and which
    MASK_DROP = 15
    BANK = 16  # which of an image's fixed draws
    CLASS_IMAGE = 17  # the initial noise of a generated class image
    CAPTION = 20  # which of an image's captions
    ASPECT = 21  # which of several aspects an image is cropped to
    SUBSET = 22  # which images of a dataset that contributes only some
    LEVEL = 23  # the noise level of an upscaler's low-resolution input
    AUGMENTATION = 24  # and that noise
    ROUNDING = 25  # stochastic rounding of bfloat16 weights
    EVALUATION = 30  # the posterior's noise and ε of the eval loss


def generator(seed: int, index: int, purpose: Purpose) -> np.random.Generator:
    """A fresh generator for (seed, index, purpose); draws of one never overlap those of another (2^192 values each)."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, 0, index]))


def uniform(seed: int, index: int, purpose: Purpose) -> float:
    """One number from U[0, 1)."""
    return generator(seed, index, purpose).random()


def normal(seed: int, index: int, purpose: Purpose, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) of the given shape, float32, on the CPU."""
    return torch.from_numpy(generator(seed, index, purpose).standard_normal(shape, dtype=np.float32))


def permutation(seed: int, index: int, purpose: Purpose, n: int) -> np.ndarray:
    """The numbers 0 … n-1 in random order [n]."""
    return generator(seed, index, purpose).permutation(n)


def torch_seed(seed: int, index: int, purpose: Purpose) -> int:
    """A 63-bit seed for torch's own generators."""
    return int(generator(seed, index, purpose).integers(2**63))
