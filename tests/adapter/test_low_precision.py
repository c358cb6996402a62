"""LoRA's branch in the base's dtype: bit-identical on float32 bases, equally accurate gradients otherwise, fewer bytes saved."""

from __future__ import annotations

import pytest
import torch

import tiny
from dreambooth_lab import lab
from dreambooth_lab.adapter import LoRA
from dreambooth_lab.adapter.low_precision import ROUNDED, lengths, rounded
from dreambooth_lab.adapter.peft_layout import NAME
from dreambooth_lab.config import conf_dir, enums
from dreambooth_lab.models.sdxl import SDXL
from dreambooth_lab.optimizer import Rate, build_optimizer
from dreambooth_lab.quant.base import quantise

PARTS = ["attention", "feed_forward", "convolution"]


def unet(dtype, ours=True, kind=enums.QuantKind.none, alpha=6.0, algorithm="lora"):
    model = tiny.unet(24, 16, 4).to(dtype).requires_grad_(False)
    if kind is not enums.QuantKind.none:
        quantise(model, kind, [])
    LoRA(4, alpha, 0.0, PARTS, [], algorithm).attach(model, SDXL.target_modules, 0)
    draws = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data * (1 + torch.randn(parameter.shape, generator=draws) * 0.1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=draws) * 0.1
    for layer in model.modules() if not ours else ():
        if hasattr(layer, "lora_variant"):
            own = [type(variant).__mro__[2] for variant in layer.lora_variant.values() if algorithm == "dora"]
            layer.lora_variant.clear()
            layer.lora_variant.update({NAME: own[0]()} if own else {})
            layer.cast_input_dtype_enabled = True
    return model


def step(model, dtype):
    """Prediction and gradient of a batch."""
    draws = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=draws).to(dtype)  # noqa: E731
    added_cond = {"text_embeds": draw(2, 16), "time_ids": torch.full((2, 6), 64.0)}
    prediction = model(draw(2, 4, 8, 8), torch.tensor([100, 700]), draw(2, 77, 24), added_cond_kwargs=added_cond).sample.float()
    (prediction - 1).square().mean().backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g.dtype is torch.float32 for g in gradient.values())
    return prediction.detach(), gradient


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient.values()])


@pytest.mark.parametrize("algorithm", ["lora", "dora"])
def test_float32_base_is_bit_identical_to_peft(algorithm):
    (one, g1), (other, g2) = (step(unet(torch.float32, ours, algorithm=algorithm), torch.float32) for ours in (True, False))
    assert torch.equal(one, other) and all(torch.equal(g1[name], g2[name]) for name in g2)


CASES = [
    *(("lora", kind) for kind in (enums.QuantKind.none, enums.QuantKind.int8, enums.QuantKind.int8_torchao)),
    *(("dora", kind) for kind in (enums.QuantKind.none, enums.QuantKind.int8_torchao)),
]


@pytest.mark.parametrize(("algorithm", "kind"), CASES, ids=[f"{algorithm} {kind.name}" for algorithm, kind in CASES])
def test_gradient_error_is_no_larger_than_with_a_float32_branch(algorithm, kind):
    exact, wanted = step(unet(torch.float32, kind=kind, algorithm=algorithm), torch.float32)
    wanted, errors = flat(wanted), {}
    for ours in (True, False):
        prediction, gradient = step(unet(torch.bfloat16, ours, kind, algorithm=algorithm), torch.bfloat16)
        errors[ours] = float((flat(gradient) - wanted).norm() / wanted.norm())
        assert torch.cosine_similarity(flat(gradient), wanted, 0) > 0.999
        assert (prediction - exact).norm() < 0.03 * exact.norm()
    assert errors[True] < 1.5 * errors[False], "the base's rounding dominates either way"


def kept_for_backward(model, dtype):
    """Bytes saved by autograd, without weights; each storage counts once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, dtype)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("algorithm", ["lora", "dora"])
def test_fewer_bytes_are_saved_for_backward(algorithm):
    models = (*(unet(torch.bfloat16, ours, algorithm=algorithm) for ours in (True, False)), bare())
    ours, pefts, none = (kept_for_backward(model, torch.bfloat16) for model in models)
    assert ours - none < 0.6 * (pefts - none)


def bare():
    """The base alone. Its first convolution requires a gradient, so that all later layers save their inputs."""
    model = tiny.unet(24, 16, 4).to(torch.bfloat16).requires_grad_(False)
    model.conv_in.weight = torch.nn.Parameter(model.conv_in.weight.detach().float())
    model.conv_in.forward = lambda x: torch.nn.functional.conv2d(
        x, model.conv_in.weight.to(x.dtype), model.conv_in.bias, padding=1
    )
    return model


def test_rounded_factors_are_cached_until_they_change():
    model = unet(torch.bfloat16)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and NAME in m.lora_A)
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    first = rounded(layer, a, b, torch.bfloat16)
    assert rounded(layer, a, b, torch.bfloat16)[0] is first[0]
    with torch.no_grad():
        assert rounded(layer, a, b, torch.bfloat16)[0] is first[0], "a forward pass without gradient uses the same"
        a.add_(1)  # in place, as an optimiser does
    changed = rounded(layer, a, b, torch.bfloat16)
    assert torch.equal(changed[0], a.to(torch.bfloat16)) and torch.equal(changed[1], b.to(torch.bfloat16))
    a.data = torch.zeros_like(a)  # as when weights are replaced by their average
    assert not rounded(layer, a, b, torch.bfloat16)[0].any()
    assert ROUNDED not in dict(layer.named_buffers()) and not any(ROUNDED in key for key in model.state_dict())


def test_gradients_accumulate_over_backward_passes():
    """Micro-batches share the rounded factors."""
    model, twice = unet(torch.bfloat16), unet(torch.bfloat16)
    _, once = step(model, torch.bfloat16)
    step(twice, torch.bfloat16)
    _, added = step(twice, torch.bfloat16)
    for name, gradient in once.items():
        assert torch.allclose(added[name], 2 * gradient, rtol=1e-5, atol=1e-8)


def test_checkpointed_blocks_have_the_same_gradient():
    plain, checkpointed = unet(torch.bfloat16), unet(torch.bfloat16)
    checkpointed.enable_gradient_checkpointing()
    checkpointed.train()
    (_, wanted), (_, found) = step(plain, torch.bfloat16), step(checkpointed, torch.bfloat16)
    assert torch.cosine_similarity(flat(wanted), flat(found), 0) > 0.99999


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "optimizer").glob("*.yaml")))
def test_factors_are_rounded_again_after_each_optimizer_step(name):
    """A fused or 8-bit step does not raise a parameter's version."""
    cfg, model = lab.compose("dataset.path=.", f"optimizer={name}", "optimizer.lr=1e-1"), unet(torch.bfloat16)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and NAME in m.lora_A)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(cfg.optimizer, learning, {name: Rate(1.0, True) for name in learning})
    if hasattr(optimizer, "train"):
        optimizer.train()
    factors = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    for _ in range(2):
        before = factors[1].clone()
        step(model, torch.bfloat16)
        optimizer.step()
        assert not torch.equal(factors[1], before)
        taken = rounded(layer, *factors, torch.bfloat16)
        assert all(torch.equal(low, factor.bfloat16()) for low, factor in zip(taken, factors, strict=True))


@torch.no_grad()
def test_dora_norms_are_cached_until_a_factor_changes():
    model = unet(torch.bfloat16, algorithm="dora")
    layer = next(m for m in model.modules() if hasattr(m, "lora_A") and isinstance(m.get_base_layer(), torch.nn.Linear))
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    scale, first = layer.scaling[NAME], lengths(layer, a, b, layer.scaling[NAME])
    whole = layer.get_base_layer().weight.float() + scale * b @ a
    assert torch.allclose(first, whole.norm(dim=1)) and lengths(layer, a, b, scale) is first
    x = torch.eye(layer.in_features, dtype=torch.bfloat16)
    layer.get_base_layer().weight.zero_(), b.zero_()[:, 0].fill_(1.0), a.zero_()[0].fill_(1.0)
    layer.lora_magnitude_vector[NAME].weight.copy_(lengths(layer, a, b, scale) * 1.5)
    assert torch.allclose((layer(x) - layer(0 * x)).float(), torch.full((), 1.5 * scale), rtol=1e-2)
    b.mul_(2)
    assert torch.allclose(lengths(layer, a, b, scale), 2 * first.new_full(first.shape, scale * layer.in_features**0.5))
