"""What was trained, in the forms other tools load."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from .. import __version__
from ..adapter import Learned
from ..dreambooth import TOKEN, DreamBooth
from ..runfolder import RunFolder
from .card import card
from .ema import Ema
from .hub import push


class Export(Callback):
    """At every checkpoint and when training ends: `export/` with the adapter's files, `learned_embeds.safetensors` if the token
    was learned, a model card, and the averaged ones in `export/ema/`. The folder is replaced as a whole.

    Args:
        ema: the run's average, or None.
    """

    def __init__(self, cfg: DictConfig, folder: RunFolder, ema: Ema | None):
        self.cfg, self.folder, self.ema = cfg, folder, ema
        self.step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step != self.step and step % self.cfg.checkpoint.every_n_steps == 0 and step != trainer.max_steps:
            self.write(pl_module, step, self.folder.export)
        self.step = step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(pl_module, trainer.global_step, self.folder.export)
        if self.cfg.export.push_to_hub:
            push(self.cfg.export, self.folder.export, f"{self.cfg.dataset.instance_prompt}: {trainer.global_step} steps")

    def write(self, module: LightningModule, step: int, target: Path, why: str = "") -> None:
        """Put the module's present weights into a folder, in place of what is there.

        Args:
            why: this step's are kept, for the card.
        """
        assert isinstance(module, DreamBooth)
        was_training = module.training
        module.eval()
        aside, old = (target.with_name(f"{target.name}.{name}") for name in ("new", "old"))
        shutil.rmtree(aside, ignore_errors=True)
        learned: dict[str, Mapping[str, Tensor]] = {".": module.learning()}
        if self.ema:
            learned["ema"] = self.ema.average()
        for name, weights in learned.items():
            self._write_one(aside / name, target / name, module, weights, step, why)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        module.train(was_training)

    def _write_one(
        self, folder: Path, place: Path, module: DreamBooth, weights: Mapping[str, Tensor], step: int, why: str
    ) -> None:  # fmt: skip
        """Into `folder`, which becomes `place` when all is there."""
        family, owned = module.family, module.by_owner(weights)
        folder.mkdir(parents=True)
        if token := owned.pop(TOKEN, None):
            family.save_token(folder, list(token.values()))
        own = owned.pop(family.denoiser_part)
        module.adapter.export(folder, Learned(family.denoiser_part, own, owned, self._header(weights, step), family.kohya))
        word = module.text.token.word if module.text and module.text.token else None
        text = card(self.cfg, self.folder, folder, place, step, module.adapter, family, word, why)
        (folder / "README.md").write_text(text, encoding="utf-8")

    def _header(self, weights: Mapping[str, Tensor], step: int) -> dict[str, str]:
        """Of every safetensors file: what made it, less whom pictures were sent to, since addresses can be secret."""
        public = OmegaConf.masked_copy(self.cfg, [str(key) for key in self.cfg if key != "webhook"])
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].detach().cpu().contiguous().numpy().tobytes())
        return {
            "base_model": self.cfg.model.pretrained,
            "instance_prompt": self.cfg.dataset.instance_prompt,
            "steps": str(step),
            "made_by": f"dreambooth-lab {__version__}",
            "weights_sha256": digest.hexdigest(),
            "config": OmegaConf.to_yaml(public, resolve=True),
        }
