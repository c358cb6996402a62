"""Quantisation of the frozen base model. Only this package imports optimum.quanto, torchao and bitsandbytes, and only when
used."""

from .base import (
    Backend,
    Quantised,
    Quantiser,
    Source,
    backend,
    bytes_per_weight,
    check_supported,
    layers_to_quantize,
    quantise,
    silence_warnings,
)

silence_warnings()  # before anything imports diffusers, which imports torchao

__all__ = [
    "Backend",
    "Quantised",
    "Quantiser",
    "Source",
    "backend",
    "bytes_per_weight",
    "check_supported",
    "layers_to_quantize",
    "quantise",
    "silence_warnings",
]
