"""The trained adapter in the form other tools load."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from ..dreambooth import DreamBooth
from ..runfolder import RunFolder
from .ema import Ema

PREFIX = "denoiser."  # of the module's parameter names


class Export(Callback):
    """When training ends: `export/pytorch_lora_weights.safetensors`, and the averaged weights in `export/ema/`.

    Args:
        ema: the run's average, or None.
    """

    def __init__(self, folder: RunFolder, ema: Ema | None):
        self.folder, self.ema = folder, ema

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DreamBooth)
        adapter, family = pl_module.adapter, pl_module.family
        family.save_lora(self.folder.export, adapter.layers(), adapter.metadata())
        if self.ema:
            average = {name.removeprefix(PREFIX): weight for name, weight in self.ema.shadow.items()}
            family.save_lora(self.folder.export / "ema", adapter.layers(average), adapter.metadata())
