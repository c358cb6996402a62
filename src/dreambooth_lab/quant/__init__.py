"""The frozen base in fewer bits. Only this package imports optimum.quanto, torchao and bitsandbytes, and only when used."""

from .base import Backend, Quantised, Quantiser, Source, backend, hush, quantise, require

hush()  # before anything imports diffusers, which imports torchao

__all__ = ["Backend", "Quantised", "Quantiser", "Source", "backend", "hush", "quantise", "require"]
