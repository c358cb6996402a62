"""Scenes as the UNet will see them: views with a size and a crop, encoded once and kept on disk.

The latents' per-channel mean and spread are folded into the VAE's 1×1 convolutions, so that diffusers' own
`latents · scaling_factor` has zero mean and unit variance.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreambooth_lab.config import ConfigError
from dreambooth_lab.tools.pretrain_toybox.vae import SDXL_SCALE, VaeStage, held_out, psnr, to_tensor
from dreambooth_lab.toybox.world import BUCKETS, Scene, Size, render, scene


@dataclass(frozen=True)
class View:
    """A scene as photographed: what SDXL's time_ids tell."""

    scene: Scene
    size: Size  # of the training picture
    original: Size  # before resizing and cropping
    crop: tuple[int, int]  # top, left

    @property
    def time_ids(self) -> tuple[int, ...]:
        return (*self.original, *self.crop, *self.size)


def view(seed: int) -> View:
    """The training set's picture number `seed`: mostly whole, some real crops, a few enlarged from half the size."""
    rng = np.random.default_rng([seed, 0x76])
    h, w = BUCKETS[int(rng.choice(3, p=(0.64, 0.18, 0.18)))]
    kind, more = rng.random(), int(rng.integers(8, 40))
    if kind < 0.06:
        return View(scene(seed), (h, w), (h // 2, w // 2), (0, 0))
    if kind < 0.25:  # the original is longer on one side
        tall = bool(rng.random() < 0.5)
        crop = int(rng.integers(0, more + 1))
        return View(scene(seed), (h, w), (h + more * tall, w + more * (not tall)), (crop * tall, crop * (not tall)))
    return View(scene(seed), (h, w), (h, w), (0, 0))


def photograph(v: View) -> Image.Image:
    image, (h, w), (top, left) = render(v.scene, v.original).image, v.size, v.crop
    if v.original < v.size:
        return image.resize((w, h), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + w, top + h))


class Photographs(Dataset):
    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, i: int) -> Tensor:
        return to_tensor(np.asarray(photograph(view(self.seeds[i]))))


@torch.no_grad()
def encode(vae: Any, seeds: list[int], batch: int = 32) -> Tensor:
    """Posterior means of views of one size [N 16 h w], float32."""
    loader = DataLoader(Photographs(seeds), batch_size=batch, num_workers=1)
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(x).latent_dist.mean.float() for x in loader])


def fold(vae: Any, mean: Tensor, std: Tensor) -> Any:
    """The same autoencoder with z' = (z - mean) / (std · scale): exact, for mean and log-variance alike."""
    vae, spread, c = copy.deepcopy(vae), std * vae.config.scaling_factor, len(mean)
    with torch.no_grad():
        w, b = vae.quant_conv.weight, vae.quant_conv.bias  # [2C 2C 1 1], [2C]
        w[:c] /= spread.view(-1, 1, 1, 1)
        b[:c] = (b[:c] - mean) / spread
        b[c:] -= 2 * spread.log()
        w, b = vae.post_quant_conv.weight, vae.post_quant_conv.bias  # [C C 1 1], [C]
        b += w[:, :, 0, 0] @ mean
        w *= spread.view(1, -1, 1, 1)
    return vae


def name(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def trained_vae(cfg: Any) -> Any:
    """The averaged weights, with the polished decoder if there is one."""
    stage, polished = VaeStage(cfg.vae), Path(cfg.out) / "polish/last.ckpt"
    path = polished if polished.exists() else Path(cfg.out) / "vae/last.ckpt"
    stage.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return stage.ema["vae"].eval()


def shipped_vae(cfg: Any) -> Any:
    """The base model's autoencoder, folded already."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(Path(cfg.base) / "vae", torch_dtype=torch.float32).eval()


def folded(vae: Any, n: int = 384) -> Any:
    """Folded with the statistics of scenes that neither training nor evaluation uses."""
    x, _ = held_out(n, start=1_000_000)
    with torch.no_grad():
        z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(32)])
    return fold(vae, z.mean((0, 2, 3)), z.std((0, 2, 3)))


def gate(vae: Any, least: float) -> None:
    """Nothing is built on an autoencoder that loses too much: raises `ConfigError` under `least` dB on held-out scenes."""
    whole, _ = psnr(vae)
    if whole < least:
        out = "train it longer (vae.steps, polish.steps), or lower latents.least_psnr and say so"
        raise ConfigError(f"the autoencoder keeps {whole:.2f} dB on held-out scenes, under latents.least_psnr={least}; {out}")


def run(cfg: Any) -> None:
    torch.manual_seed(cfg.seed)
    folder, vae = Path(cfg.out) / "latents", shipped_vae(cfg) if cfg.latents.shipped_vae else folded(trained_vae(cfg))
    gate(vae, cfg.latents.least_psnr)
    vae.save_pretrained(folder / "vae")
    by_size: dict[Size, list[int]] = {size: [] for size in BUCKETS}
    for seed in range(cfg.latents.scenes):
        by_size[view(seed).size].append(seed)
    for size, seeds in by_size.items():
        np.save(folder / f"{name(size)}.seeds.npy", np.array(seeds))
        np.save(folder / f"{name(size)}.npy", (encode(vae, seeds) * SDXL_SCALE).half().numpy())


class Cache:
    """The latents of every view, by size."""

    def __init__(self, folder: Path) -> None:
        self.latents = {s: torch.from_numpy(np.load(folder / f"{name(s)}.npy")) for s in BUCKETS}
        self.views = {s: [view(int(i)) for i in np.load(folder / f"{name(s)}.seeds.npy")] for s in BUCKETS}
        self.share = np.array([len(v) for v in self.views.values()], dtype=float)
        self.share /= self.share.sum()
