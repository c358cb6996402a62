"""★ The method: DreamBooth's training step (Ruiz et al. 2023), readable like the paper."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Any

import torch
from hydra.utils import get_class
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig
from torch import Tensor

from . import draw
from .adapter import LoRA
from .batch import Batch, Cond
from .config import Schedule
from .diffusion import time
from .draw import Purpose
from .embedding import TokenEmbedding
from .losses import masked_error, preserve_prior
from .models.family import Family
from .prior import build_prior


class DreamBooth(LightningModule):
    """Teaches the family's denoiser one subject through an adapter.

    Holds no timetable: everything periodic is a callback's. Draws nothing: every random choice comes in the batch.
    """

    strict_loading = False  # checkpoints hold what learns, nothing else

    def __init__(self, cfg: DictConfig, family: Family, adapter: LoRA, token: TokenEmbedding | None = None):
        super().__init__()
        self.cfg, self.family, self.adapter = cfg, family, adapter
        self.denoiser, self.token = family.denoiser, token
        self.path = family.path
        self.prior = build_prior(cfg.prior.kind, family.denoise, adapter.base)

    def training_step(self, batch: Batch, _: int) -> dict[str, Tensor]:
        x0, eps = batch.latents(), batch.eps  #              [B C h w]  sample
        t = time.uniform(batch.u, *self.family.times)  #     [B]
        x_t = self.path.noise(x0, eps, t)  #                 [B C h w]  α_t x_0 + σ_t ε
        output = self.predict(x_t, t, self.told(batch))
        target = self.path.target(x0, eps, t)
        target = self.prior(target, batch, x_t, t)  #        the class rows' own answer
        error = masked_error(output, target, batch.mask, self.cfg.mask.normalize, self.cfg.mask.floor)  # [B]
        loss, instance, prior = preserve_prior(error, batch.instance_rows, batch.class_rows, self.cfg.prior.weight)
        parts = {"total": loss.detach()}  # Lightning divides "loss" by the number of micro-batches
        parts |= {"instance": instance.detach()} if len(batch.instance_rows) else {}
        parts |= {"prior": prior.detach()} if len(batch.class_rows) else {}
        return {"loss": loss, **parts}  # what has no rows has no value, rather than 0

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.family.denoise(x_t, t, cond)

    def told(self, batch: Batch) -> Cond:
        """The batch's conditions, with the learned token's current meaning in the captions that have it."""
        if self.token is None:
            return batch.cond
        rows = [i for i, caption in enumerate(batch.captions) if self.token.occurs_in(caption)]
        if not rows:
            return batch.cond
        text = self.family.read_text([batch.captions[i] for i in rows])
        return batch.cond.put(torch.tensor(rows, device=batch.cond.states.device), text)

    def on_train_batch_start(self, batch: Batch, _: int) -> None:
        """What little uses torch's own generator (adapter dropout) restarts from the sample index: no state to save."""
        torch.manual_seed(draw.torch_seed(self.cfg.seed, int(batch.sample[0]), Purpose.STEP))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        cfg = self.cfg.optimizer
        groups: list[dict[str, Any]] = [{"params": [p for p in self.denoiser.parameters() if p.requires_grad]}]
        if self.token:  # decay would pull the token's meaning to nothing
            rate = cfg.lr * self.cfg.adapter.token_lr_ratio
            groups.append({"params": list(self.token.parameters()), "lr": rate, "weight_decay": 0.0})
        optimizer = get_class(cfg._target_)(
            groups, lr=cfg.lr, betas=tuple(cfg.betas), eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
        )  # fmt: skip
        share = learning_rate(cfg.schedule, cfg.warmup_steps, self.cfg.trainer.max_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def learning(self) -> dict[str, Tensor]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learning = self.learning()
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in learning}


def learning_rate(schedule: Schedule, warmup: int, total: int) -> Callable[[int], float]:
    """Share of the peak rate by optimiser step: linear warm-up from 1/warmup, then constant, or half a cosine to 0."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule is Schedule.constant:
            return 1.0
        return 0.5 + 0.5 * cos(pi * min((step - warmup) / max(total - warmup, 1), 1.0))

    return share
