"""prior=weights: λ ‖ΔW‖², exact and differentiable."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.adapter import timed_rank
from dreambooth_lab.adapter.lora import squared_update
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.factory import build_family, build_method
from dreambooth_lab.run import run


@pytest.fixture
def made(small):
    def make(*words):
        cfg = lab.compose(*small, "prior=weights", "adapter.alpha=3", *words)
        family = build_family(cfg)
        data = DreamBoothData(cfg, family)
        data.prepare()
        return build_method(cfg, family)[0], iter(Samples(data, data.schedule, 0, 0, 1))

    return make


@torch.no_grad()
def move(module, scale=0.1):
    generator = torch.Generator().manual_seed(5)
    for p in module.trainable_parameters().values():
        p += scale * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("words", [[], ["+adapter.options.init=ortho_tail"], ["adapter.parts=[attention,convolution]"]])
def test_penalty_is_the_norm_of_the_full_matrices(made, words):
    module, _ = made(*words)
    assert module.adapter.squared_update() < 1e-12
    move(module)
    whole = torch.zeros((), dtype=torch.float64)
    for layer in timed_rank.layers_of(module.denoiser).values():
        a, b = (getattr(layer, f"lora_{name}")["default"].weight.flatten(1).double() for name in "AB")
        update = b @ a
        if hasattr(layer, timed_rank.DOWN):
            update = (
                update - getattr(layer, timed_rank.UP).flatten(1).double() @ getattr(layer, timed_rank.DOWN).flatten(1).double()
            )
        whole += (layer.scaling["default"] * update).square().sum()
    assert_close(module.adapter.squared_update().double(), whole, rtol=1e-4, atol=1e-7)


def test_gradient_matches_the_full_matrix(made):
    module, _ = made()
    move(module)
    layer = next(iter(timed_rank.layers_of(module.denoiser).values()))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ours = torch.autograd.grad(squared_update(layer, "default"), (a, b))
    plain = torch.autograd.grad((layer.scaling["default"] * b @ a).square().sum(), (a, b))
    for one, other in zip(ours, plain, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_full_adapter_penalty_is_the_distance_from_the_base(made):
    module, _ = made("adapter=full", "adapter.rank=1", "adapter.alpha=1")
    assert module.adapter.squared_update() == 0
    move(module, 0.01)
    count = sum(p.numel() for p in module.trainable_parameters().values())
    assert module.adapter.squared_update().item() == pytest.approx(count * 1e-4, rel=0.05)


def test_loss_is_instance_error_plus_weighted_penalty(made):
    module, stream = made("prior.weight=0.5")
    move(module)
    batch = next(stream)
    assert len(batch.class_rows) == 0 and len(batch.instance_rows) == 2
    parts = module.training_step(batch, 0)
    assert "prior" not in parts
    assert_close(parts["loss"].detach(), parts["instance"] + 0.5 * module.adapter.squared_update().detach())
    assert_close(parts["weights"], module.adapter.squared_update().detach())


def test_large_weight_keeps_the_update_small_and_is_logged(small, tmp_path):
    norms = {}
    for weight in (0.0, 100.0):
        words = [*small, "prior=weights", f"prior.weight={weight}", "trainer.max_steps=6", "optimizer.lr=1e-2"]
        run(lab.compose(*words), tmp_path / str(weight))
        norms[weight] = dict(lab.load(tmp_path / str(weight)).series["train/loss_weights"])
        assert len(norms[weight]) == 6
    assert norms[100.0][6] < 0.5 * norms[0.0][6]


@pytest.mark.parametrize("adapter", ["dora", "lokr", "locon", "oft"])
def test_unsupported_adapters_are_refused(adapter):
    with pytest.raises(ConfigError, match=rf"prior.kind is weights with adapter.algorithm=.*{adapter}.*use adapter=lora or full"):
        check(lab.compose("prior=weights", f"adapter={adapter}"))


def test_monitoring_the_class_loss_is_refused():
    with pytest.raises(ConfigError, match="but prior is weights"):
        check(lab.compose("prior=weights", "checkpoint.monitor=train/loss_prior"))
