"""The decoder alone, a little longer: the encoder stays, so cached latents and a UNet trained on them remain valid."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from dreambooth_lab.tools.pretrain_toybox.runner import fit
from dreambooth_lab.tools.pretrain_toybox.vae import VaeBatch, VaeStage, draw_batch, image_loss, show


class PolishStage(VaeStage):
    def groups(self) -> list[dict[str, Any]]:
        vae = self.nets["vae"]
        return [{"params": [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()], "lr": self.cfg.lr}]

    def loss(self, batch: VaeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        vae, x = self.nets["vae"], batch.image
        with torch.no_grad():
            z = vae.encode(x).latent_dist.mean.float()
        random = torch.Generator().manual_seed(batch.seed)
        y = vae.decode(z + batch.noise * z.std() * torch.randn(z.shape, generator=random)).sample.float()
        loss = image_loss(y, x, batch.mask)
        return loss, {"loss": loss.detach(), "mse": (y - x).square().mean().detach()}


def settings(cfg: Any) -> Any:
    """The VAE stage's, with what polishing changes."""
    return OmegaConf.merge(cfg.vae, cfg.polish)


def run(cfg: Any) -> None:
    torch.manual_seed(cfg.seed)
    out, own = Path(cfg.out), settings(cfg)
    stage = PolishStage(own)
    trained = torch.load(out / "vae/last.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    averaged = {k.removeprefix("ema."): v for k, v in trained.items() if k.startswith("ema.")}
    stage.nets.load_state_dict(averaged)
    stage.ema.load_state_dict(averaged)
    folder = out / "polish"
    first = 1 + cfg.vae.steps  # batches that the VAE stage has not seen
    fit(stage, lambda step: draw_batch(first + step, own, cfg.seed), folder, lambda s, n: show(s, n, folder), own.workers)
