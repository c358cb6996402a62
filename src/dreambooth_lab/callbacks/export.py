"""Exports the trained weights in the formats of other programs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor

from ..adapter import ExportWeights, Form
from ..config import enums
from ..dreambooth import TOKEN, DreamBooth
from ..models.family import Family
from ..runfolder import RunFolder
from ..storage import durable
from ..storage.durable import apply_umask
from .card import card
from .ema import Ema
from .finite import require_finite
from .header import Described, header, strip
from .hub import push


class Export(Callback):
    """At every checkpoint and when training ends, writes `export/` with the adapter's files, `embeddings/WORD.safetensors` if the
    token was trained, a model card that says what each file is for, and the averaged weights in `export/ema/`. The folder is
    replaced atomically.

    Args:
        ema: the run's average, or None.
        tags: dataset → part of a caption → number of images with it.
    """

    def __init__(self, cfg: DictConfig, folder: RunFolder, ema: Ema | None, tags: Mapping[str, Mapping[str, int]]):
        self.cfg, self.folder, self.ema, self.tags = cfg, folder, ema, tags
        self.step = 0
        self.trains = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step, self.trains = trainer.global_step, True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self.step and step % self.cfg.checkpoint.every_n_steps == 0 and step != trainer.max_steps:
            self.write(pl_module, step, self.folder.export)
        self.step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(pl_module, trainer.global_step, self.folder.export)
        if self.cfg.export.push_to_hub:
            push(self.cfg.export, self.folder.export, f"{self.cfg.dataset.instance_prompt}: {trainer.global_step} steps")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.trains:  # it was killed after its last checkpoint: no step is left, so Lightning calls no hooks
            self.on_train_end(trainer, pl_module)

    def write(self, module: LightningModule, step: int, target: Path, why: str = "") -> None:
        """Export the module's current weights to a folder, which is replaced.

        Args:
            why: the reason why this step is exported, for the card.
        """
        assert isinstance(module, DreamBooth)
        was_training = module.training
        module.eval()
        learned: dict[str, Mapping[str, Tensor]] = {"ema": self.ema.average()} if self.ema else {}
        learned["."] = module.trainable_parameters()  # last: its card lists the folder of the average
        with durable.atomic_folder(target) as made:
            for name, weights in learned.items():
                require_finite(weights, step)
                self._write_one(made / name, target / name, module, weights, step, why)
        module.train(was_training)

    def _write_one(
        self, folder: Path, place: Path, module: DreamBooth, weights: Mapping[str, Tensor], step: int, why: str
    ) -> None:  # fmt: skip
        """Write into `folder`, which is moved to `place` when complete."""
        family, adapter, owned = module.family, module.adapter, module.by_owner(weights)
        averaged = folder.name == "ema"
        form = export_form(self.cfg, family, averaged)
        folder.mkdir(parents=True, exist_ok=True)
        word = module.text.token.word if module.text and module.text.token else None
        token, own = owned.pop(TOKEN, None), owned.pop(family.denoiser_part)
        described = Described(
            form.name, family.spec, adapter.kind, family.path.prediction, self.tags, self.folder.newest_image(averaged), step,
            _digest(weights),
        )  # fmt: skip
        files = adapter.export(
            folder, ExportWeights(family.denoiser_part, own, owned, header(self.cfg, described), family.kohya, form)
        )
        if token and word:
            header_fields = header(self.cfg, described._replace(kind="textual-inversion", name=word))
            files[family.save_token(folder, word, list(token.values()), header_fields)] = "embedding"
        text = card(self.cfg, self.folder, folder, place, step, adapter, family, form, files, word, why)
        (folder / "README.md").write_text(text, encoding="utf-8")
        if self.cfg.export.metadata is not enums.Metadata.full:
            strip(folder)
        apply_umask(folder)


def export_form(cfg: DictConfig, family: Family, averaged: bool = False) -> Form:
    """The format of a run's exported files. A file that no other program reads is omitted, and a pipeline without a LoRA
    loader gets peft's folder."""
    formats = list(cfg.export.formats)
    lora = cfg.adapter.algorithm in ("lora", "dora")
    if lora and not family.programs:
        formats = [one for one in formats if one is not enums.Format.comfyui]
    if lora and not family.loads_lora:
        formats = [enums.Format.peft, enums.Format.diffusers]
    name = f"{cfg.export.name}_ema" if averaged else cfg.export.name
    return Form(name, getattr(torch, cfg.export.dtype.value), tuple(formats))


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        numbers = weights[name].detach().cpu().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
        digest.update(name.encode() + numbers.numpy().tobytes())
    return digest.hexdigest()
