"""The trained weights: adapters inside a frozen denoiser, or its own weights. One file per library."""

from .base import Adapter, ExportWeights, Form, matching_layers, temporarily_replaced
from .full import Full
from .lora import LoRA
from .lycoris import Lycoris

__all__ = ["Adapter", "ExportWeights", "Form", "Full", "LoRA", "Lycoris", "matching_layers", "temporarily_replaced"]
