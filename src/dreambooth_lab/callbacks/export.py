"""The trained adapter in the form other tools load."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from ..dreambooth import DreamBooth
from ..runfolder import RunFolder
from .ema import Ema

PREFIX = "denoiser."  # of the module's parameter names


class Export(Callback):
    """When training ends: `export/pytorch_lora_weights.safetensors`, `learned_embeds.safetensors` if the token was learned,
    and the averaged ones in `export/ema/`.

    Args:
        ema: the run's average, or None.
    """

    def __init__(self, folder: RunFolder, ema: Ema | None):
        self.folder, self.ema = folder, ema

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DreamBooth)
        adapter, family = pl_module.adapter, pl_module.family
        learned = {self.folder.export: pl_module.learning()}
        if self.ema:
            learned[self.folder.export / "ema"] = self.ema.shadow
        for folder, weights in learned.items():
            own = {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name.startswith(PREFIX)}
            family.save_lora(folder, adapter.layers(own), adapter.metadata())
            if pl_module.token:
                family.save_token(folder, [w for name, w in weights.items() if name.startswith("token.")])
