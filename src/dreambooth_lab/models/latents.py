"""Images to latents in the denoiser's scale, and back: one formula, with the constants of each kind of VAE."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError

TILE = 512  # px, for tiled encoding and decoding


class Latents:
    """z = (x - offset) · factor, by channel, for x of the VAE's posterior; offset = shift_factor + latents_mean and
    factor = scaling_factor / latents_std, each if a VAE's config has it.

    Args:
        config: of the VAE.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.channels = int(config.get("latent_channels", config.get("z_dim", 0)))
        self.factor = 2 ** (len(config.get("block_out_channels", ())) - 1)  # pixels per latent cell
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        self.offset = _by_channel(0.0 if mean is None else mean) + (config.get("shift_factor") or 0.0)
        self.scale = _by_channel(config.get("scaling_factor") or 1.0) / _by_channel(1.0 if std is None else std)

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B 3 H W] → the posterior's mean and std [B C h w], float32."""
        rows = [self._posterior(vae, row) for row in pixels.split(1)]  # one at a time: a VAE's activations need much memory
        mean, std = (torch.cat(parts) for parts in zip(*rows, strict=True))
        offset, scale = self.offset.to(mean.device), self.scale.to(mean.device)
        return (mean.float() - offset) * scale, std.float() * scale

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents [B C h w] → pixels [B 3 H W], float32."""
        dtype, offset, scale = next(vae.parameters()).dtype, self.offset.to(latents.device), self.scale.to(latents.device)
        scaled = (latents.to(dtype).float() / scale + offset).to(dtype)
        return torch.cat([self._pixels(vae, row).float() for row in scaled.split(1)])

    def _posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents, return_dict=False)[0]


class Video(Latents):
    """A video VAE; images are single frames: [B C 1 h w]."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.factor = int(config.get("scale_factor_spatial") or 2 ** len(config.get("temperal_downsample", (0, 0, 0))))

    def _posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._posterior(vae, pixels[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        return super()._pixels(vae, latents[:, :, None])[:, :, 0]


class Deterministic(Latents):
    """A deep-compression autoencoder, which has no posterior: its std is 0."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.factor = 2 ** (len(config["encoder_block_out_channels"]) - 1)

    def _posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = vae.encode(pixels, return_dict=False)[0]
        return latents, torch.zeros_like(latents)


class Patched(Latents):
    """FLUX.2's: cells of p × p become channels, which are normalised by the running statistics of a batch norm."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.patch = tuple(config.get("patch_size", (2, 2)))
        self.channels *= prod(self.patch)
        self.factor *= self.patch[0]

    def _posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super()._posterior(vae, pixels)
        offset, spread = self._statistics(vae)
        return (self._fold(mean).float() - offset) / spread, self._fold(std).float() / spread

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        offset, spread = self._statistics(vae)
        return super()._pixels(vae, self._unfold(latents.float() * spread + offset).to(latents.dtype))

    def _statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        spread = torch.sqrt(vae.bn.running_var.float() + self.config["batch_norm_eps"])
        return vae.bn.running_mean.float().view(1, -1, 1, 1), spread.view(1, -1, 1, 1)

    def _fold(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(x, self.patch[0])

    def _unfold(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(x, self.patch[0])


def in_tiles(vae: Any) -> Any:
    """The VAE, with tiling enabled.

    Raises:
        ConfigError: its class does not support tiling.
    """
    if not hasattr(vae, "enable_tiling"):
        raise ConfigError(f"model.vae_tiling is true, but a {type(vae).__name__} does not support tiling; set it to false")
    vae.enable_tiling()
    size = vars(vae).get("tile_sample_min_size", 0)  # AutoencoderKL's default is as large as its training images
    if isinstance(size, int) and size > TILE:
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, vae.tile_latent_min_size * TILE // size
    return vae


class Pixels:
    """No VAE: the denoiser works on pixels in [-1, 1].

    Args:
        channels: of the denoiser.
    """

    factor = 1

    def __init__(self, channels: int = 3):
        self.channels = channels

    def encode(self, vae: None, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return pixels.float(), torch.zeros_like(pixels, dtype=torch.float32)

    def decode(self, vae: None, latents: Tensor) -> Tensor:
        return latents.float()


RULES: dict[str, type[Latents]] = {
    "AutoencoderKL": Latents,
    "AutoencoderKLFlux2": Patched,
    "AutoencoderKLQwenImage": Video,
    "AutoencoderKLWan": Video,
    "AutoencoderDC": Deterministic,
}


def rule(config: Mapping[str, Any], prefix: str) -> Latents:
    """The latent format of a VAE with this config.

    Raises:
        ConfigError: its kind is not known.
    """
    name = config.get("_class_name")
    if name not in RULES:
        raise ConfigError(f"{prefix} has a {name}, whose latents are not supported; supported: {', '.join(RULES)}")
    return RULES[name](config)


def _by_channel(values: Any) -> Tensor:
    """[1 C 1 1], or [1 1 1 1] for one number."""
    return torch.as_tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
