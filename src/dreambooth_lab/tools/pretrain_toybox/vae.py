"""The autoencoder: AutoencoderKL, f = 8, sixteen latent channels.

Plain L1 loses the objects' colours first, so errors inside the object weigh more and chroma has a term of its own;
an early guide ties three latent channels to the average colours; noise and half-scale decoding make latents smooth.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dreambooth_lab.tools.pretrain_toybox.runner import Stage, fit, grid
from dreambooth_lab.tools.pretrain_toybox.textures import texture
from dreambooth_lab.toybox.world import BUCKETS, SQUARE, Size, render, scene

HELD_OUT = 10_000_000  # scenes from here on are never trained on
SDXL_SCALE = 0.13025


class VaeBatch(NamedTuple):
    image: Tensor  # [B 3 H W], -1 … 1
    mask: Tensor  # [B 1 H W], 0 … 1
    noise: float  # relative strength added to the latents
    half: bool  # decode at half scale
    guide: float  # weight of the colour guide
    seed: int


def new_vae(cfg: Any) -> Any:
    blocks = len(cfg.channels)
    return AutoencoderKL(
        block_out_channels=tuple(cfg.channels),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=cfg.layers, latent_channels=cfg.latent_channels, norm_num_groups=cfg.groups,
        mid_block_add_attention=False, sample_size=128, scaling_factor=SDXL_SCALE, force_upcast=False,
    )  # fmt: skip


def to_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def drawn(seed: int, size: Size, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A scene, sometimes seen closer, sometimes in colours the world lacks."""
    h, w = size
    zoom = float(rng.choice([1.0, 1.0, 1.0, 1.4]))
    picture = render(scene(seed), (int(h * zoom), int(w * zoom)))
    top, left = rng.integers(0, int(h * zoom) - h + 1), rng.integers(0, int(w * zoom) - w + 1)
    pixels = np.asarray(picture.image)[top : top + h, left : left + w]
    if rng.random() < 0.2:
        pixels = np.clip(pixels[..., rng.permutation(3)] * rng.uniform(0.7, 1.1, 3), 0, 255)
    mask = torch.from_numpy(np.asarray(picture.mask)[top : top + h, left : left + w].astype(np.float32) / 255)
    return to_tensor(pixels), mask[None]


def draw_batch(step: int, cfg: Any, seed: int) -> VaeBatch:
    rng = np.random.default_rng([seed, step])
    size = BUCKETS[int(rng.choice(3, p=(0.7, 0.15, 0.15)))]
    n = round(cfg.batch * (1 - cfg.textures))
    pairs = [drawn(int(rng.integers(HELD_OUT)), size, rng) for _ in range(n)]
    plain = [to_tensor(texture(int(rng.integers(2**31)), size)) for _ in range(cfg.batch - n)]
    image = torch.stack([p for p, _ in pairs] + plain)
    mask = torch.cat([torch.stack([m for _, m in pairs]), torch.zeros(len(plain), 1, *size)])
    guide = max(0.0, 1 - step / (cfg.guide_until * cfg.steps))
    return VaeBatch(image, mask, cfg.noise * float(rng.random()), bool(rng.random() < cfg.half), guide, int(rng.integers(2**31)))


def chroma(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def image_loss(y: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Mask-weighted L1 + L2, chroma, and the differences between neighbours."""
    weight = 1 + 4 * mask
    weight = weight / weight.mean()
    error = y - x
    edges = sum((a - b).abs().mean() for a, b in zip(gradients(y), gradients(x), strict=True))
    return (weight * (error.abs() + 2 * error.square())).mean() + (weight * chroma(error).abs()).mean() + 0.5 * edges


class VaeStage(Stage):
    def __init__(self, cfg: Any) -> None:
        super().__init__(nn.ModuleDict({"vae": new_vae(cfg)}), nn.ModuleDict({"vae": new_vae(cfg)}), cfg)

    def loss(self, batch: VaeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        vae, x, mask = self.nets["vae"], batch.image, batch.mask
        posterior = vae.encode(x).latent_dist
        z = posterior.mean.float()  # [B 16 H/8 W/8]
        guide = (z[:, :3] - 2 * F.avg_pool2d(x, 8)).square().mean()
        random = torch.Generator().manual_seed(batch.seed)
        latents = z + torch.randn(z.shape, generator=random) * (batch.noise * z.detach().std() + 0.5 * posterior.std.float())
        if batch.half:
            latents, x, mask = F.avg_pool2d(latents, 2), F.avg_pool2d(x, 2), F.avg_pool2d(mask, 2)
        y = vae.decode(latents).sample.float()
        fit_loss = image_loss(y, x, mask)
        total = fit_loss + 0.1 * batch.guide * guide + self.cfg.kl * posterior.kl().mean() / z[0].numel()
        seen = {} if batch.half else {"loss": fit_loss.detach(), "mse": (y - x).square().mean().detach()}
        return total, seen


def held_out(n: int, size: Size = SQUARE, start: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures [n 3 h w] and masks [n 1 h w] that no stage trains on."""
    pictures = [render(scene(HELD_OUT + start + i), size) for i in range(n)]
    masks = [torch.from_numpy(np.asarray(p.mask).astype(np.float32) / 255)[None] for p in pictures]
    return torch.stack([to_tensor(np.asarray(p.image)) for p in pictures]), torch.stack(masks)


@torch.no_grad()
def psnr(vae: Any, n: int = 48) -> tuple[float, float]:
    """Mean over held-out scenes, whole and inside the objects, dB (peak = 2)."""
    x, mask = held_out(n)
    error = torch.cat([(vae.decode(vae.encode(c).latent_dist.mean).sample.clamp(-1, 1) - c).square() for c in x.split(8)])
    inside = (error * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)))
    decibel = [10 * torch.log10(4 / e).mean().item() for e in (error.mean((1, 2, 3)), inside)]
    return decibel[0], decibel[1]


def show(stage: Stage, step: int, folder: Path) -> None:
    vae = stage.ema["vae"]
    x, _ = held_out(12)
    grid([x, vae.decode(vae.encode(x).latent_dist.mean).sample], folder / f"{step:06d}.png")
    whole, inside = psnr(vae)
    with (folder / "psnr.txt").open("a") as f:
        f.write(f"{step} psnr {whole:.2f} inside {inside:.2f}\n")


def train(cfg: Any, seed: int, out: Path) -> VaeStage:
    torch.manual_seed(seed)
    stage = VaeStage(cfg)
    fit(stage, lambda step: draw_batch(step, cfg, seed), out, lambda s, step: show(s, step, out), workers=cfg.workers)
    return stage


def run(cfg: Any) -> None:
    train(cfg.vae, cfg.seed, Path(cfg.out) / "vae")
