"""Paths from a scheduler's settings, and settings that are refused by name."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch.testing import assert_close

from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.models import latents, schedule

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def config(kind, **settings):
    return {"_class_name": kind.__name__, **kind(**settings).config}


@pytest.mark.parametrize(
    "kind", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_betas_match_the_schedulers(kind):
    scheduler = getattr(diffusers, kind)
    found = schedule.read(config(scheduler, **BETAS), "x")
    assert_close(found.path.alphas_cumprod[:-1].float(), scheduler(**BETAS).alphas_cumprod.float())
    assert found.shift == 1.0 and found.dynamic is None


def test_zero_terminal_snr_is_read_and_excluded_from_the_times():
    settings = BETAS | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path = schedule.read(config(diffusers.DDIMScheduler, **settings), "x").path
    alpha, sigma = path.exact_scales(torch.tensor([0.9999, path.top]))
    assert alpha[0] == 0 and sigma[0] == 1 and alpha[1] > 0 and path.prediction is enums.Prediction.v_prediction


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (config(diffusers.EDMEulerScheduler), "EDMEulerScheduler, which has no betas of its own"),
        (config(diffusers.EDMDPMSolverMultistepScheduler), "no betas of its own"),
        (config(diffusers.DDPMScheduler, **BETAS, prediction_type="sample"), "prediction_type 'sample'"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "secret"}, "beta_schedule 'secret'"),
    ],
)
def test_unsupported_schedule_settings_are_refused_by_name(settings, why):
    with pytest.raises(ConfigError, match=f"x has .*{why}|x has a {why}"):
        schedule.read(settings, "x")


def test_distilled_model_gives_a_notice(caplog):
    schedule.read(config(diffusers.LCMScheduler, **BETAS), "x")
    assert "distilled" in caplog.text


def test_flow_shift_is_static_or_depends_on_size():
    static = schedule.read(config(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0), "x")
    assert static.path.straight and static.shift_of(None) == 3.0 == static.shift_of(0.7)
    dynamic = schedule.read(config(diffusers.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True), "x")
    assert dynamic.shift_of(1.15) == pytest.approx(torch.tensor(1.15).exp().item())
    solver = config(
        diffusers.DPMSolverMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    assert schedule.read(solver, "x").path.straight and schedule.read(solver, "x").shift == 3.0


def test_latents_use_the_vaes_scale_shift_and_statistics():
    torch.manual_seed(0)
    vae_config = {
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
        "latents_mean": [1.0, -1.0, 0.0, 2.0],
        "latents_std": [2.0, 1.0, 0.5, 4.0],
    }
    rule = latents.Latents({"latent_channels": 4, "block_out_channels": [8] * 4, **vae_config})
    x = torch.randn(2, 4, 3, 5)
    z = (x - rule.offset) * rule.scale
    mean, std = (torch.tensor(vae_config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    assert_close(z, (x - 0.25 - mean) * 0.5 / std)
    with pytest.raises(ConfigError, match="x has a Strange, whose latents are not supported; supported: AutoencoderKL"):
        latents.rule({"_class_name": "Strange"}, "x")
