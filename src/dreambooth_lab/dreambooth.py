"""★ The method: DreamBooth's training step (Ruiz et al. 2023), in the paper's order and notation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from . import draw
from .adapter import Adapter
from .batch import Batch, Cond, to_device
from .config import enums
from .diffusion.time import build_times
from .draw import Purpose
from .losses import (
    Penalty,
    consistency,
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
from .optimizer import Rate, add_lora_plus, build_optimizer, build_schedule, set_rates
from .prior import Teacher, build_prior
from .rollout import NoisedSample, build_reflexflow, build_rollout
from .trainable_text import TrainableText
from .uncertainty import Uncertainty

TOKEN = "token"  # the part that the rare token's embeddings belong to
UNCERTAINTY = "uncertainty."  # prefix of the parameters of the learned loss weight


class DreamBooth(LightningModule):
    """Fine-tunes the family's denoiser on one subject through an adapter.

    Everything periodic is a callback. Nothing is drawn here: all random numbers come with the batch.
    """

    strict_loading = False  # checkpoints hold the trainable parameters only

    def __init__(self, cfg: DictConfig, family: Family, adapter: Adapter, text: TrainableText | None = None):
        super().__init__()
        self.cfg, self.family, self.adapter = cfg, family, adapter
        self.denoiser, self.outside, self.text = family.denoiser, adapter.extra_module(), text
        self._point: list[Tensor] = []
        self.path = family.path
        require_finite(cfg.objective.weight, family.path)
        self.uncertainty = Uncertainty() if cfg.objective.weight is enums.Weight.learned else None
        self.times = build_times(cfg.objective, family.times, family.shift)
        self.teacher = Teacher(family.denoise, adapter.base)
        self.prior = build_prior(cfg.prior.kind, self.teacher)
        self.rollout = build_rollout(cfg.rollout, self.path, family.times[1], family.shift, self.predict, self.dropout_off)
        self.reflexflow = build_reflexflow(cfg.rollout, self.path, self.predict)

    def training_step(self, batch: Batch, _: int) -> dict[str, Tensor]:
        x0, cond = batch.latents(), self.conditioning(batch)
        when = self.times(batch.u, x0.shape[2:])  #                                      [B]        on the host, like u
        t = to_device(when, x0.device)
        at = self.rollout(x0, batch, cond, when, self.global_step)  #                    [B C h w]  noised or rolled out
        output = self.predict(at.x_t, t, cond)
        target = self.path.target(x0, at.eps, t)
        target = self.prior(target, batch, at.x_t, t)  #                                            class rows only
        error = self.error(output, target, batch, cond, t, at) * self.weight(t)  #       [B]
        error = self.anchored(error, target, batch, at.x_t, t)
        weighted = self.uncertainty(error, self.path.snr(t), batch.instance_rows) if self.uncertainty else error
        loss = preserve_prior(weighted, batch.instance_rows, batch.class_rows, batch.row_counts, self.cfg.prior.weight)
        moved = self.adapter.squared_update() if self.cfg.prior.kind is enums.PriorKind.weights else None
        if moved is not None:
            loss = loss + self.cfg.prior.weight * moved  #                               λ ‖ΔW‖²
        parts = {"loss": loss, "total": loss.detach()}  # Lightning divides "loss" by the number of micro-batches
        parts |= {} if moved is None else {"weights": moved.detach()}
        terms = {"instance": batch.instance_rows, "prior": batch.class_rows}  # a term without rows is omitted, not 0
        return parts | {name: error[rows].detach().mean() for name, rows in terms.items() if len(rows)}

    def error(self, output: Tensor, target: Tensor, batch: Batch, cond: Cond, t: Tensor, at: NoisedSample) -> Tensor:
        """Each row's error [B]: inside its mask, plus ReflexFlow's terms and the error outside the mask if they are on."""
        mask, normalize, floor = batch.mask, self.cfg.mask.normalize, self.cfg.mask.min_weight
        penalty = self.penalty(t)
        if self.reflexflow:
            penalty = self.reflexflow.weighted_penalty(penalty, output, batch, cond, t, at.rolled_out)
        error = masked_error(output, target, mask, normalize, floor, penalty)
        if self.reflexflow:
            rolled_out = to_device(at.rolled_out, output.device)
            own = rolled_out.index_fill(0, batch.class_rows, False)  # class rows have the prior's target
            error = error + self.reflexflow.direction_loss(output, at.x_t, batch.latents(), own, mask)
        rows = batch.instance_rows
        if mask is None or self.cfg.mask.outside is enums.Outside.ignore or len(rows) == 0:
            return error
        teacher_output = self.teacher.predict_base(batch, at.x_t, t, rows)
        return error.index_add(0, rows, outside_error(output[rows], teacher_output, mask[rows], floor, self.penalty(t[rows])))

    def anchored(self, error: Tensor, target: Tensor, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        """Weighted errors [B] with those of the instance rows held to the base model's, if `objective.anchor` says so."""
        rows, cfg = batch.instance_rows, self.cfg.objective
        if cfg.anchor is enums.Anchor.none or len(rows) == 0:
            return error
        base_output, mask = self.teacher.predict_base(batch, x_t, t, rows), self.cfg.mask
        shown = None if batch.mask is None else batch.mask[rows]
        base_error = masked_error(base_output, target[rows], shown, mask.normalize, mask.min_weight, self.penalty(t[rows]))
        return error.index_copy(0, rows, consistency(error[rows], base_error * self.weight(t[rows]), cfg.anchor_beta))

    def penalty(self, t: Tensor) -> Penalty:
        """The elementwise loss for rows at times t."""
        cfg = self.cfg.objective
        if cfg.loss is enums.LossKind.l2:
            return squared
        return partial(pseudo_huber, c=huber_width(cfg.huber_schedule, cfg.huber_c, self.path.snr(t)))

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight of each row at times t [B]."""
        return time_weight(self.cfg.objective.weight, self.cfg.objective.gamma, self.path, t)

    @contextmanager
    def dropout_off(self) -> Iterator[None]:
        """A context without dropout; afterwards every module is in its former mode. Unlike `eval`, it keeps the training weights
        of a schedule-free optimiser."""
        training, before = self.training, [(part, part.training) for part in self.modules()]
        super().train(False)
        try:
            yield
        finally:
            super().train(training)  # also sets the mode of modules that an adapter keeps elsewhere
            for part, mode in before:
                part.training = mode

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.family.denoise(x_t, t, cond)

    def conditioning(self, batch: Batch) -> Cond:
        """The batch's conditioning. Captions whose encoding is being trained are encoded again; the others come from the
        cache."""
        rows = [i for i, caption in enumerate(batch.captions) if self.text and self.text.changes(caption)]
        if not self.text or not rows:
            return batch.cond
        text = self.text.read([batch.captions[i] for i in rows])
        return batch.cond.replace_rows(to_device(torch.tensor(rows), batch.mean.device), text)

    def on_train_batch_start(self, batch: Batch, _: int) -> None:
        """Seed torch's own generator, which only adapter dropout uses, from the sample index, so that no state has to be
        saved."""
        torch.manual_seed(draw.torch_seed(self.cfg.seed, int(batch.sample[0]), Purpose.STEP))

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the model's gradient; that of the learned loss weight has no part in its norm."""
        if self.uncertainty is None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_grad_norm_(self.trainable_parameters().values(), gradient_clip_val)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        cfg, learning = self.cfg.optimizer, self.optimized_parameters()
        optimizer = build_optimizer(cfg, learning, {name: self.rate(name) for name in learning}, self.cfg.seed)
        schedule = build_schedule(cfg, optimizer, cfg.schedule_steps or self.cfg.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, name: str) -> Rate:
        """Learning rate ratio and weight decay of a parameter."""
        if name.startswith(UNCERTAINTY):
            return Rate(self.cfg.objective.uncertainty_lr / self.cfg.optimizer.lr, False)
        cfg, (part, own) = self.cfg.adapter, self.owner(name)
        if part == TOKEN:  # weight decay would pull the embedding to 0
            return Rate(cfg.token_lr_ratio, False)
        encoder = "" if part == self.family.denoiser_part else part
        ratio = self.adapter.lr_ratio(own, encoder) * (cfg.text_lr_ratio if encoder else 1.0)
        return Rate(ratio * add_lora_plus(own, self.cfg.optimizer.lora_plus_ratio), True)

    def owner(self, name: str) -> tuple[str, str]:
        """The part of the pipeline that a parameter belongs to (or `TOKEN`), and its name in that part."""
        for prefix in ("denoiser.", "outside."):
            if name.startswith(prefix):
                return self.family.denoiser_part, name.removeprefix(prefix)
        where, _, own = name.removeprefix("text.encoders.").removeprefix("text.").partition(".")
        return where, own

    def by_owner(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Group weights, named as in this module, by part of the pipeline (or `TOKEN`) and name in that part."""
        owned: dict[str, dict[str, Tensor]] = {}
        for name, weight in weights.items():
            part, own = self.owner(name)
            owned.setdefault(part, {})[own] = weight
        return owned

    def on_train_start(self) -> None:
        self.train()
        for configured in self.trainer.lr_scheduler_configs:
            set_rates(cast(LambdaLR, configured.scheduler))

    def train(self, mode: bool = True) -> DreamBooth:
        """Switch schedule-free optimisers too: they have training weights and an average for evaluation."""
        super().train(mode)
        trainer = self._trainer
        if trainer and trainer.optimizers and hasattr(trainer.optimizers[0], "eval"):
            self._switch(trainer.optimizers[0], mode)
        return self

    def _switch(self, optimizer: Any, mode: bool) -> None:
        """Switch to the average, and back to exactly the training weights: the optimiser's own conversion rounds."""
        learning = self.optimized_parameters().values()
        if not mode and not self._point:
            self._point = [p.detach().clone() for p in learning]
        (optimizer.train if mode else optimizer.eval)()
        if mode and self._point:
            for p, before in zip(learning, self._point, strict=True):
                p.data.copy_(before)
            self._point = []

    def trainable_parameters(self) -> dict[str, Tensor]:
        """The model's trainable parameters by name, which are exported and averaged."""
        return {name: p for name, p in self.optimized_parameters().items() if not name.startswith(UNCERTAINTY)}

    def optimized_parameters(self) -> dict[str, Tensor]:
        """The same with those of the learned loss weight: what the optimiser has and checkpoints hold."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learning = self.optimized_parameters()
        checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in learning}
