"""What learns: small trainable parts inside a frozen denoiser, or its own weights. One file a library."""

from .base import Adapter, Learned, match, swapped
from .full import Full
from .lora import LoRA
from .lycoris import Lycoris

__all__ = ["Adapter", "Full", "Learned", "LoRA", "Lycoris", "match", "swapped"]
