"""★ The method: DreamBooth's training step (Ruiz et al. 2023), readable like the paper."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi
from typing import Any

import torch
from hydra.utils import get_class
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from . import draw
from .adapter import Adapter
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

    def __init__(self, cfg: DictConfig, family: Family, adapter: Adapter, token: TokenEmbedding | None = None):
        super().__init__()
        self.cfg, self.family, self.adapter = cfg, family, adapter
        self.denoiser, self.outside, self.token = family.denoiser, adapter.outside(), token
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
        rated: dict[float, list[Tensor]] = {}
        for name, parameter in self.learning().items():
            if not name.startswith("token."):
                plus = cfg.lora_plus_ratio if "lora_B" in name or "lora_up" in name else 1.0
                rated.setdefault(self.adapter.lr_ratio(name) * plus, []).append(parameter)
        groups: list[dict[str, Any]] = [{"params": group, "lr": cfg.lr * ratio} for ratio, group in sorted(rated.items())]
        if self.token:  # decay would pull the token's meaning to nothing
            rate = cfg.lr * self.cfg.adapter.token_lr_ratio
            groups.append({"params": list(self.token.parameters()), "lr": rate, "weight_decay": 0.0})
        options = {str(key): tuple(v) if isinstance(v, ListConfig) else v for key, v in cfg.options.items()}
        optimizer = get_class(cfg._target_)(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, **options)
        share = learning_rate(cfg.schedule, cfg.warmup_steps, self.cfg.trainer.max_steps, cfg.cycles)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        self.train()

    def train(self, mode: bool = True) -> DreamBooth:
        """Schedule-free optimisers keep two points: the one that trains, and the average that is looked at."""
        super().train(mode)
        turn = getattr(self._optimizer(), "train" if mode else "eval", None)
        if turn:
            turn()
        return self

    def _optimizer(self) -> Any:
        trainer = self._trainer
        return trainer.optimizers[0] if trainer and trainer.optimizers else None

    def learning(self) -> dict[str, Tensor]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learning = self.learning()
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in learning}


def learning_rate(schedule: Schedule, warmup: int, total: int, cycles: int = 1) -> Callable[[int], float]:
    """Share of the peak rate by optimiser step: linear warm-up from 1/warmup, then constant, a line to 0, half a cosine to 0,
    or `cycles` half cosines that each start at the peak."""

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule is Schedule.constant:
            return 1.0
        done = min((step - warmup) / max(total - warmup, 1), 1.0)
        if schedule is Schedule.linear:
            return 1.0 - done
        turns = cycles if schedule is Schedule.restarts and done < 1 else 1
        return 0.5 + 0.5 * cos(pi * (done * turns % 1 if turns > 1 else done))

    return share
