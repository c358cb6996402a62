"""LyCORIS' own presets and configuration files are used unchanged."""

from __future__ import annotations

import json
import re

import pytest
import torch
from lycoris import create_lycoris_from_weights
from test_matrix import build, compose, learned, question
from torch.testing import assert_close

from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.config.schema import BlockConfig
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family

SIMPLETUNERS = {
    "algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 12,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"FeedForward": {"factor": 4}, "Attention": {"factor": 2}},
    },
}  # fmt: skip


@pytest.fixture
def make(tiny_sdxl):
    def made(adapter="lokr", preset=None, **more):
        cfg = compose(tiny_sdxl, adapter)
        cfg.adapter.preset = preset
        for key, value in more.items():
            cfg.adapter[key] = value
        check(cfg)
        family, ours = build_family(cfg), build_adapter(cfg)
        layers = attach(cfg, family, ours, None)
        return DreamBooth(cfg, family, ours).eval(), layers

    return made


def save(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def kinds(module, layers):
    return {type(module.denoiser.get_submodule(layer)).__name__ for layer in layers}


def test_presets_select_the_documented_layers(make):
    for preset, convolutions, everywhere in (
        ("full", True, True),
        ("attn-mlp", False, False),
        ("unet-convblock-only", True, True),
    ):
        module, layers = make("locon", preset)
        resnets = any("resnets" in layer for layer in layers)
        assert (("Conv2d" in kinds(module, layers)), resnets) == (convolutions, everywhere), preset
    _, again = make("locon", "attn-mlp")
    assert not any("resnets" in layer for layer in again), "the previous preset has no effect"


def test_simpletuner_file_is_read_unchanged(make, tmp_path):
    module, layers = make("locon", save(tmp_path / "lycoris_config.json", SIMPLETUNERS))
    assert layers and all(".attn" in layer or ".ff." in layer for layer in layers)
    small = {lora.lora_name: lora.lokr_w1.shape for lora in module.adapter.network.loras if "to_q" in lora.lora_name}
    assert set(small.values()) == {(2, 2)}, "the factor of the attention rule, not the general one"
    assert all("lokr" in name for name in module.trainable_parameters())


def test_export_config_and_weights_rebuild_the_adapter(make, tmp_path):
    rules = [BlockConfig(match="to_v", rank=2, lr_ratio=1.0)]
    module, layers = make("locon", blocks=rules, options={"use_tucker": True})
    for p in module.trainable_parameters().values():
        p.data += 0.05 * torch.randn(p.shape)
    module.adapter.export(tmp_path / "export", learned(module))
    again, same = make("lokr", str(tmp_path / "export" / "lycoris_config.json"), init_from=str(tmp_path / "export"))
    assert same == layers
    with torch.no_grad():
        assert_close(again.predict(*question()), module.predict(*question()))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ({"algo": "full"}, "adapter=full"),
        ({"algo": "locon", "use_scalar": True}, "folds the scalar"),
        ({"algo": "nonsense"}, "LyCORIS has lora, locon"),
        ({"algo": "lokr", "linear_dmi": 4}, "'linear_dmi', which LyCORIS' lokr does not know; similar: "),
        ({"apply_preset": {"target_modules": ["Attention"]}}, r"\['target_modules'\] in apply_preset"),
        ({"apply_preset": {"target_module": ["Nothing"]}}, "matches no layer"),
        ({"apply_preset": ["Attention"]}, "which is not of the form"),
        ([], "which is not of the form"),
    ],
)
def test_invalid_files_are_refused(content, error, make, tmp_path):
    with pytest.raises(ConfigError, match=error):
        make("lokr", save(tmp_path / "wrong.json", content))


def test_missing_presets_and_conflicting_keys_are_refused(make, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json', which does not exist"):
        make(preset=str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"adapter\.preset is 'attn'; give a lycoris_config\.json, or one of full, "):
        make(preset="attn")
    with pytest.raises(ConfigError, match=r"remove adapter\.targets, or the preset"):
        make(preset="attn-mlp", targets=["to_q"])
    with pytest.raises(ConfigError, match=r"adapter\.options has 'factr', which LyCORIS' lokr does not know; similar: factor"):
        make(options={"factr": 4})


KINDS = [
    ("locon", {"dora_wd": True}), ("loha", {"dora_wd": True}), ("lokr", {"dora_wd": True, "factor": 2}), ("glora", {}),
    ("boft", {}), ("diag-oft", {}), ("lokr", {"full_matrix": True}), ("locon", {"use_tucker": True}),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=[f"{kind} {''.join(options)}" for kind, options in KINDS])
def test_other_algorithms_train_export_and_load_with_lycoris_alone(algorithm, options, make, tiny_sdxl, tmp_path):
    module, _ = make("locon", algorithm=algorithm, options=options)
    ask = question()
    with torch.no_grad(), module.adapter.base():
        base = module.predict(*ask)
    optimizer = torch.optim.Adam(module.trainable_parameters().values(), lr=3e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (module.predict(*ask) - 1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        trained = module.predict(*ask)
        with module.adapter.base():
            assert torch.equal(module.predict(*ask), base)
    assert (trained - base).abs().max() > 1e-3
    module.adapter.export(tmp_path, learned(module))
    fresh = build_family(module.cfg)
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "lycoris.safetensors"), fresh.denoiser)
    network.apply_to()
    with torch.no_grad():
        assert_close(fresh.denoise(*ask), trained, atol=1e-4, rtol=1e-4)


FACTORED = [
    ("locon", {}), ("locon", {"use_tucker": True}), ("locon", {"rs_lora": True}), ("loha", {}), ("loha", {"use_tucker": True}),
    ("lokr", {"factor": 2}), ("lokr", {"factor": 2, "use_tucker": True}), ("lokr", {"full_matrix": True}),
    ("lokr", {"decompose_both": True}),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "options"), FACTORED, ids=[f"{kind} {''.join(options)}" for kind, options in FACTORED])
def test_factored_update_matches_the_weight_update(algorithm, options, make):
    preset = {"parts": ["attention", "feed_forward", "convolution"], "rank": 2, "algorithm": algorithm, "options": options}
    module, layers = make("locon", **preset)
    assert any("resnets" in layer for layer in layers)
    loras = module.adapter.network.loras
    assert all(lora.bypass_mode for lora in loras), "no module keeps a copy of its layer's weight"
    for p in module.trainable_parameters().values():
        p.data += 0.05 * torch.randn(p.shape)
    ask, found = question(), []
    for by_factors in (True, False):
        for lora in loras:
            lora.bypass_mode = by_factors
        output = module.predict(*ask)
        found.append([output, *torch.autograd.grad((output - 1).square().mean(), list(module.trainable_parameters().values()))])
    assert_close(*found, atol=1e-5, rtol=1e-3)


def test_algorithms_without_factored_form_use_the_weights(make):
    for options in ({"algorithm": "diag-oft"}, {"algorithm": "locon", "options": {"dora_wd": True}}):
        assert not any(lora.bypass_mode for lora in make("locon", **options)[0].adapter.network.loras)
    for options in (True, False):
        module, _ = make("locon", options={"bypass_mode": options})
        assert {lora.bypass_mode for lora in module.adapter.network.loras} == {options}, "explicit options take precedence"


@torch.no_grad()
def test_update_below_bfloat16_resolution_of_the_weight_has_an_effect(tiny_sdxl):
    cfg = compose(tiny_sdxl, "locon", dtype="bfloat16")
    cfg.adapter.parts = ["attention"]
    module, _ = build(cfg)
    lora = module.adapter.network.loras[0]
    layer = lora.org_module[0]
    x = torch.ones(1, layer.in_features, dtype=torch.bfloat16)
    x[:, 1::2] = -1
    layer.weight.fill_(1)  # W x = 0, and 1 + ΔW is 1 in bfloat16
    lora.lora_down.weight.zero_()[:, ::2] = 1e-2
    lora.lora_up.weight.fill_(1e-2)
    update = lora.scale * (lora.lora_up.weight @ (lora.lora_down.weight @ x.float().T)).T
    bias = 0 if layer.bias is None else layer.bias.float()
    assert update.abs().min() > 0
    assert_close((layer(x).float() - bias), update, rtol=2e-2, atol=0)


def test_target_is_one_layer_and_patterns_are_compiled_once(monkeypatch, make):
    compiled, compile_ = [], re.compile
    monkeypatch.setattr(re, "compile", lambda *message: compiled.append(message) or compile_(*message))
    targets = ["re:.*attn1.to_q", "attn2.to_k"]
    _, layers = make("locon", targets=targets)
    mine = [message for message in compiled if "to_q" in str(message) or "to_k" in str(message)]
    assert len(mine) <= 2 * len(targets), "names of layers are compared, not compiled"
    assert layers and all(layer.endswith(("attn1.to_q", "attn2.to_k")) for layer in layers)
