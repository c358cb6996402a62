"""The properties that the method relies on, on a tiny SDXL."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.adapter import LoRA, matching_layers
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import build_adapter, build_family
from dreambooth_lab.optimizer import learning_rate


@pytest.fixture
def made(small):
    def make(*overrides):
        cfg = lab.compose(*small, *overrides)
        family = build_family(cfg)
        data = DreamBoothData(cfg, family)
        data.prepare()
        adapter = build_adapter(cfg)
        adapter.attach(family.denoiser, family.target_modules, seed=0)
        module = DreamBooth(cfg, family, adapter).train()
        return module, iter(Samples(data, data.schedule, 0, 0, 1))

    return make


def move(module, scale=0.05):
    """Perturb the adapter's weights, as training does."""
    generator = torch.Generator().manual_seed(5)
    for p in module.trainable_parameters().values():
        p.data += scale * torch.randn(p.shape, generator=generator)


def prediction(module, batch):
    with torch.no_grad():
        return module.predict(batch.latents(), batch.u, batch.cond)


def test_model_without_adapter_is_bit_identical_to_the_base(made):
    module, stream = made()
    batch = next(stream)
    base = build_family(module.cfg).denoise(batch.latents(), batch.u, batch.cond)
    move(module)
    assert (prediction(module, batch) - base).abs().max() > 1e-3
    with module.adapter.base():
        assert torch.equal(prediction(module, batch), base)
    again = prediction(module, batch)
    with module.adapter.base():
        pass
    assert torch.equal(prediction(module, batch), again), "the adapter is restored"


def test_fresh_adapter_has_zero_prior_loss(made):
    module, stream = made()
    losses = module.training_step(next(stream), 0)
    assert losses["prior"] < 1e-9 < losses["instance"]


def test_teacher_runs_on_class_rows_only(made):
    module, stream = made()
    move(module)
    batch = next(stream)
    x_t, t = batch.latents(), batch.u
    seen = []
    real = module.prior.predict
    module.prior.predict = lambda *a: seen.append(a) or real(*a)
    target = module.prior(batch.eps, batch, x_t, t)
    assert len(seen) == 1 and torch.equal(seen[0][0], x_t[batch.class_rows])
    assert torch.equal(target[batch.instance_rows], batch.eps[batch.instance_rows])
    with module.adapter.base():
        assert_close(target[batch.class_rows], prediction(module, batch)[batch.class_rows])
    assert not target.requires_grad


@pytest.mark.parametrize("prior", ["teacher", "noise"])
def test_gradients_reach_only_the_adapter(made, prior):
    module, stream = made(f"prior={prior}")
    move(module)
    module.training_step(next(stream), 0)["loss"].backward()
    learning = module.trainable_parameters()
    for name, p in module.named_parameters():
        assert (p.grad is not None) == (name in learning), name
    assert all("lora_" in name for name in learning)
    assert any(p.grad.abs().sum() > 0 for p in learning.values())


def test_zero_prior_weight_gives_instance_gradients_only(made):
    module, stream = made("prior.weight=0")
    move(module)
    batch = next(stream)
    module.training_step(batch, 0)["loss"].backward()
    weighted = [p.grad.clone() for p in module.trainable_parameters().values()]
    module.zero_grad()
    x_t = module.path.noise(batch.latents(), batch.eps, batch.u)
    error = (module.predict(x_t, batch.u, batch.cond) - batch.eps).square().mean((1, 2, 3))
    error[batch.instance_rows].mean().backward()
    for a, p in zip(weighted, module.trainable_parameters().values(), strict=True):
        assert_close(a, p.grad)


def test_terms_without_rows_are_not_logged(made):
    module, stream = made("prior=none")
    assert "prior" not in module.training_step(next(stream), 0)


def test_default_targets_are_attention_and_feed_forward(made):
    module, _ = made()
    layers = {name.split(".lora_")[0].split(".")[-1] for name in module.trainable_parameters()}
    assert layers == {"to_q", "to_k", "to_v", "0", "proj", "2"}
    attention, _ = made("adapter.parts=[attention]")
    assert len(attention.trainable_parameters()) < len(module.trainable_parameters())
    assert not any("ff" in name for name in attention.trainable_parameters())


def test_unmatched_target_error_lists_similar_layers(tiny_sdxl, small):
    unet = build_family(lab.compose(*small)).denoiser
    with pytest.raises(ConfigError, match=r"'to_qq' matches no layer of the model; similar: .*to_q"):
        matching_layers(unet, ["to_qq"])
    with pytest.raises(ConfigError, match=r"adapter.parts has \['attn'\]; set adapter.parts to some of"):
        LoRA(4, 4.0, 0.0, ["attn"], []).attach(unet, {"attention": ("to_q",)}, 0)


def test_adapter_init_depends_on_the_seed_and_not_on_the_global_generator(made):
    torch.manual_seed(1)
    first, _ = made()
    state = torch.get_rng_state()
    second, _ = made()
    assert torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.trainable_parameters().values(), second.trainable_parameters().values(), strict=True)
    )


def test_adapter_trains_in_float32_on_a_bfloat16_base(made):
    module, stream = made("model.dtype=bfloat16")
    assert {p.dtype for p in module.trainable_parameters().values()} == {torch.float32}
    module.training_step(next(stream), 0)["loss"].backward()


def test_learning_rate_schedules():
    constant, cosine = (learning_rate(kind, 4, 104) for kind in (enums.Schedule.constant, enums.Schedule.cosine))
    assert [constant(s) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert (cosine(3), cosine(4)) == (1.0, 1.0)
    assert_close(cosine(54), 0.5)
    assert cosine(102) > cosine(103) > 0 and cosine(103) == cosine(104) == cosine(200), "the last learning rate"
