"""★ The method: DreamBooth's training step (Ruiz et al. 2023), readable like the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig
from torch import Tensor

from . import draw
from .adapter import Adapter
from .batch import Batch, Cond
from .config import LossKind, Outside
from .diffusion.time import build_times
from .draw import Purpose
from .learned_text import LearnedText
from .losses import (
    Penalty,
    huber_width,
    masked_error,
    outside_error,
    preserve_prior,
    pseudo_huber,
    require_finite,
    squared,
    time_weight,
)
from .models.family import Family
from .optimizer import Rate, build_optimizer, build_schedule, plus
from .prior import Teacher, build_prior
from .rollout import Reached, build_reflexflow, build_rollout

TOKEN = "token"  # owner of the rare token's rows


class DreamBooth(LightningModule):
    """Teaches the family's denoiser one subject through an adapter.

    Holds no timetable: everything periodic is a callback's. Draws nothing: every random choice comes in the batch.
    """

    strict_loading = False  # checkpoints hold what learns, nothing else

    def __init__(self, cfg: DictConfig, family: Family, adapter: Adapter, text: LearnedText | None = None):
        super().__init__()
        self.cfg, self.family, self.adapter = cfg, family, adapter
        self.denoiser, self.outside, self.text = family.denoiser, adapter.outside(), text
        self._point: list[Tensor] = []
        self.path = family.path
        require_finite(cfg.objective.weight, family.path)
        self.times = build_times(cfg.objective, family.times, family.shift)
        self.teacher = Teacher(family.denoise, adapter.base)
        self.prior = build_prior(cfg.prior.kind, self.teacher)
        self.rollout = build_rollout(cfg.rollout, self.path, family.times[1], family.shift, self.predict, self.at_rest)
        self.reflexflow = build_reflexflow(cfg.rollout, self.path, self.predict)

    def training_step(self, batch: Batch, _: int) -> dict[str, Tensor]:
        x0, cond = batch.latents(), self.told(batch)
        t = self.times(batch.u, x0.shape[2:])  #                                         [B]        when
        at = self.rollout(x0, batch, cond, t, self.global_step)  #                       [B C h w]  x_t, by ε or by the model
        output = self.predict(at.x_t, t, cond)
        target = self.path.target(x0, at.eps, t)
        target = self.prior(target, batch, at.x_t, t)  #                                            the class rows' own answer
        error = self.error(output, target, batch, cond, t, at) * self.weight(t)  #       [B]
        loss, instance, prior = preserve_prior(error, batch.instance_rows, batch.class_rows, batch.kinds, self.cfg.prior.weight)
        parts = {"total": loss.detach()}  # Lightning divides "loss" by the number of micro-batches
        parts |= {"instance": instance.detach()} if batch.kinds.instances else {}
        parts |= {"prior": prior.detach()} if batch.kinds.classes else {}
        return {"loss": loss, **parts}  # what has no rows has no value, rather than 0

    def error(self, output: Tensor, target: Tensor, batch: Batch, cond: Cond, t: Tensor, at: Reached) -> Tensor:
        """Each row's error inside its mask, outside it if that is asked for, and of a strayed velocity [B]."""
        mask, normalize, floor = batch.mask, self.cfg.mask.normalize, self.cfg.mask.floor
        penalty = self.penalty(t)
        if self.reflexflow:
            penalty = self.reflexflow.weigh(penalty, output, batch, cond, t, at.strayed)
        error = masked_error(output, target, mask, normalize, floor, penalty)
        if self.reflexflow:
            own = at.strayed.index_fill(0, batch.class_rows, False)  # class rows are for the prior to turn
            error = error + self.reflexflow.turn(output, at.x_t, batch.latents(), own, mask)
        rows = batch.instance_rows
        if mask is None or self.cfg.mask.outside is Outside.ignore or len(rows) == 0:
            return error
        taught = self.teacher.answer(batch, at.x_t, t, rows)
        return error.index_add(0, rows, outside_error(output[rows], taught, mask[rows], floor, self.penalty(t[rows])))

    def penalty(self, t: Tensor) -> Penalty:
        """The error of an element, for rows at these times."""
        cfg = self.cfg.objective
        if cfg.loss is LossKind.l2:
            return squared
        return partial(pseudo_huber, c=huber_width(cfg.huber_schedule, cfg.huber_c, self.path.snr(t)))

    def weight(self, t: Tensor) -> Tensor:
        """Weight of each row by its time [B]."""
        return time_weight(self.cfg.objective.weight, self.cfg.objective.gamma, self.path, t)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, no dropout; after, every part is in the mode it was in. The weights are those that train, of a schedule-free
        optimiser too, so this is not `eval`."""
        training, before = self.training, [(part, part.training) for part in self.modules()]
        super().train(False)
        try:
            yield
        finally:
            super().train(training)  # reaches what an adapter keeps outside the module
            for part, mode in before:
                part.training = mode

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.family.denoise(x_t, t, cond)

    def told(self, batch: Batch) -> Cond:
        """The batch's conditions, which are the base model's, with the current meaning of the captions that training changes."""
        rows = [i for i, caption in enumerate(batch.captions) if self.text and self.text.changes(caption)]
        if not self.text or not rows:
            return batch.cond
        text = self.text.read([batch.captions[i] for i in rows])
        return batch.cond.put(torch.tensor(rows, device=batch.u.device), text)

    def on_train_batch_start(self, batch: Batch, _: int) -> None:
        """What little uses torch's own generator (adapter dropout) restarts from the sample index: no state to save."""
        torch.manual_seed(draw.torch_seed(self.cfg.seed, int(batch.sample[0]), Purpose.STEP))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        cfg, learning = self.cfg.optimizer, self.learning()
        optimizer = build_optimizer(cfg, learning, {name: self.rate(name) for name in learning})
        schedule = build_schedule(cfg, optimizer, self.cfg.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, name: str) -> Rate:
        """How a parameter learns, by whose it is."""
        cfg, (part, own) = self.cfg.adapter, self.owner(name)
        if part == TOKEN:  # decay would pull the token's meaning to nothing
            return Rate(cfg.token_lr_ratio, False)
        encoder = "" if part == self.family.denoiser_part else part
        ratio = self.adapter.lr_ratio(own, encoder) * (cfg.text_lr_ratio if encoder else 1.0)
        return Rate(ratio * plus(own, self.cfg.optimizer.lora_plus_ratio), True)

    def owner(self, name: str) -> tuple[str, str]:
        """Whose parameter it is, a part of the pipeline or the token, and its name there."""
        for prefix in ("denoiser.", "outside."):
            if name.startswith(prefix):
                return self.family.denoiser_part, name.removeprefix(prefix)
        where, _, own = name.removeprefix("text.encoders.").removeprefix("text.").partition(".")
        return where, own

    def by_owner(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Weights of the module's own names, by part of the pipeline (or the token) and name there."""
        owned: dict[str, dict[str, Tensor]] = {}
        for name, weight in weights.items():
            part, own = self.owner(name)
            owned.setdefault(part, {})[own] = weight
        return owned

    def on_train_start(self) -> None:
        self.train()

    def train(self, mode: bool = True) -> DreamBooth:
        """Schedule-free optimisers keep two points: the one that trains, and the average that is looked at."""
        super().train(mode)
        trainer = self._trainer
        if trainer and trainer.optimizers and hasattr(trainer.optimizers[0], "eval"):
            self._turn(trainer.optimizers[0], mode)
        return self

    def _turn(self, optimizer: Any, mode: bool) -> None:
        """To the average, and back to the very bits that train: the optimiser's own way back rounds."""
        learning = self.learning().values()
        if not mode and not self._point:
            self._point = [p.detach().clone() for p in learning]
        (optimizer.train if mode else optimizer.eval)()
        if mode and self._point:
            for p, before in zip(learning, self._point, strict=True):
                p.data.copy_(before)
            self._point = []

    def learning(self) -> dict[str, Tensor]:
        """The trainable parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learning = self.learning()
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in learning}
