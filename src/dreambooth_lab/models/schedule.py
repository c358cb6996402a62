"""From a scheduler's config to the path that a model was trained on. Unsupported schedulers are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import exp
from typing import Any, NamedTuple

import torch

from ..config import ConfigError, enums
from ..diffusion.path import Path, RectifiedFlow, VariancePreserving

log = logging.getLogger(__name__)

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
FEW_STEPS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")  # of distilled models


class Schedule(NamedTuple):
    """The training settings in a scheduler's config."""

    path: Path
    shift: float  # time shift, if it does not depend on the image size
    dynamic: str | None  # how the shift follows from μ of a size: exponential, linear; None: it does not depend on the size

    def shift_of(self, mu: float | None) -> float:
        """The time shift of a size for which the pipeline passes μ to its scheduler."""
        if self.dynamic is None or mu is None:
            return self.shift
        return exp(mu) if self.dynamic == "exponential" else mu


def read(config: Mapping[str, Any], prefix: str) -> Schedule:
    """The path of a scheduler's config.

    Args:
        said: prefix of error messages: the model of the scheduler.

    Raises:
        ConfigError: the scheduler is not supported.
    """
    name = str(config.get("_class_name"))
    prediction = config.get("prediction_type", "epsilon")
    if name in FEW_STEPS:
        log.warning(
            "%s has a %s: it is distilled to a few steps; training on the whole path slowly undoes the distillation", prefix, name
        )
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas") or prediction == "flow_prediction":
        return _flow(config)
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ConfigError(
            f"{prefix} has a {name}, which has no betas of its own (EDM-style); such models can't be trained here yet"
        )
    if prediction not in ("epsilon", "v_prediction"):
        raise ConfigError(f"{prefix} has prediction_type {prediction!r}; only epsilon, v_prediction and flow can be trained")
    alphas = alphas_cumprod(config, prefix)
    if prediction == "epsilon" and float(alphas[-1]) == 0:
        raise ConfigError(
            f"{prefix} has rescale_betas_zero_snr with prediction_type epsilon, which has no information at pure noise"
        )
    return Schedule(VariancePreserving(alphas, enums.Prediction(prediction)), 1.0, None)


def _flow(config: Mapping[str, Any]) -> Schedule:
    shift = config.get("flow_shift", config.get("shift", 1.0)) or 1.0
    dynamic = config.get("time_shift_type", "exponential") if config.get("use_dynamic_shifting") else None
    return Schedule(RectifiedFlow(int(config.get("num_train_timesteps", 1000))), float(shift), dynamic)


def alphas_cumprod(config: Mapping[str, Any], prefix: str) -> torch.Tensor:
    """ᾱ [N] of the betas that a configuration names, by diffusers' own DDPM scheduler."""
    from diffusers import DDPMScheduler

    if config.get("trained_betas") is None and config["beta_schedule"] not in BETAS:
        raise ConfigError(f"{prefix} has beta_schedule {config['beta_schedule']!r}; known: {', '.join(BETAS)}")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    asked = {name: config[name] for name in names if name in config}
    scheduler: Any = DDPMScheduler(**asked, rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)))
    return scheduler.alphas_cumprod
