"""`adapter.init_from` reads a LoRA in any layout; its update does not depend on the run's alpha."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_matrix import ALL, build, compose, learned, question
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.adapter import ExportWeights
from dreambooth_lab.config import ConfigError
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family, build_trainable_text


@pytest.fixture(scope="module")
def trained(tiny_sdxl, tmp_path_factory):
    """An export with alpha 3 and rank 4, with and without its stored settings, and the model's prediction."""
    cfg, folder = compose(tiny_sdxl, "lora"), tmp_path_factory.mktemp("export")
    module, _ = build(cfg)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    module.adapter.export(folder, learned(module))
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    bare = {key: tensor * 2 if ".lora_B." in key else tensor for key, tensor in weights.items()}
    bare |= {f"{key}.alpha": torch.tensor(2.0) for key in _layers(folder)}  # 2 / 4 of twice the update
    save_file(bare, folder / "bare.safetensors")
    with torch.no_grad():
        return folder, module.eval().predict(*question())


def _layers(folder):
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return {key.rpartition(".lora_")[0] for key in weights}


@pytest.mark.parametrize("alpha", [3, 6])
@pytest.mark.parametrize("name", ["kohya.safetensors", "peft", "peft/adapter_model.safetensors", "bare.safetensors"])
def test_all_layouts_give_the_same_update(name, alpha, trained, tiny_sdxl):
    folder, prediction = trained
    cfg = compose(tiny_sdxl, "lora")
    cfg.adapter.alpha, cfg.adapter.init_from = alpha, str(folder / name)
    module, _ = build(cfg, seed=5)
    assert all(p.dtype is torch.float32 and p.requires_grad for p in module.trainable_parameters().values())
    with torch.no_grad():
        assert_close(module.eval().predict(*question()), prediction, atol=1e-5, rtol=1e-5)
        with module.adapter.base():
            assert (module.predict(*question()) - prediction).abs().max() > 1e-2


def test_file_without_alpha_uses_its_rank(trained, tiny_sdxl, tmp_path):
    """4/4, not the run's 8/4."""
    folder, _ = trained
    save_file(load_file(folder / "pytorch_lora_weights.safetensors"), tmp_path / "none.safetensors")
    predictions = []
    for alpha in (4, 8):
        cfg = compose(tiny_sdxl, "lora")
        cfg.adapter.alpha, cfg.adapter.init_from = alpha, str(tmp_path / "none.safetensors")
        with torch.no_grad():
            predictions.append(build(cfg)[0].eval().predict(*question()))
    assert_close(*predictions, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["kohya.safetensors", "peft"])
def test_text_encoder_layouts_give_the_same_update(name, tiny_sdxl, tmp_path):
    def made():
        cfg = compose(tiny_sdxl, "lora")
        cfg.adapter.text_encoders = [1, 2]
        family, adapter = build_family(cfg), build_adapter(cfg)
        text = build_trainable_text(cfg, family)
        attach(cfg, family, adapter, text)
        return DreamBooth(cfg, family, adapter, text)

    one, other = made(), made()
    for parameter in one.trainable_parameters().values():
        parameter.data += 0.1
    one.adapter.export(tmp_path, learned(one))
    other.adapter.load_weights(tmp_path / name)
    ours, theirs = one.trainable_parameters(), other.trainable_parameters()
    assert ours.keys() == theirs.keys() and any("text" in key for key in ours)
    for key in ours:
        assert_close(theirs[key], ours[key], atol=1e-6, rtol=1e-6)


def test_mismatched_files_and_pickles_are_refused(trained, tiny_sdxl, tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(pickle.dumps({"a": 1}))
    cfg = compose(tiny_sdxl, "lora")
    cfg.adapter.init_from = str(tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=r"adapter\.init_from .*lora\.safetensors.*pickle"):
        build(cfg)
    cfg.adapter.rank, cfg.adapter.init_from = 2, str(trained[0] / "kohya.safetensors")
    with pytest.raises(ConfigError, match=r"adapter\.init_from is .*kohya"):
        build(cfg)


def test_ai_toolkit_layout_uses_its_rank_with_a_warning(folders, tmp_path, caplog):
    """The keys of its transformer files start with `diffusion_model`, and no alpha is stored."""
    words = ["model=flux", f"model.pretrained={folders('flux')}", "model.dtype=float32", "model.tae=null", "dataset=folder"]
    cfg = lab.compose(*words, "dataset.path=.", "adapter.rank=4", "adapter.alpha=2", "trainer.accelerator=cpu")
    one, other = (build_adapter(cfg) for _ in range(2))
    for seed, adapter in enumerate((one, other)):
        family = build_family(cfg)
        adapter.attach(family.denoiser, family.target_modules, seed)
    ours = {name: torch.nn.init.normal_(p) for name, p in one.model.named_parameters() if p.requires_grad}
    one.export(tmp_path, ExportWeights("transformer", ours, {}, {}, {}, ALL))
    weights = load_file(tmp_path / "kohya.safetensors")
    assert all(key.startswith("transformer.") for key in weights), "without kohya's names the keys are diffusers'"
    save_file({key.replace("transformer.", "diffusion_model.", 1): t for key, t in weights.items()}, tmp_path / "ai.safetensors")
    other.load_weights(tmp_path / "ai.safetensors")
    theirs = {name: p for name, p in other.model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert_close(parameter, ours[name], atol=1e-5, rtol=1e-5)
    assert f"{len(weights) // 2} layers of" in caplog.text and "have no alpha" in caplog.text


def test_file_with_fused_layers_is_refused_with_a_fix(tiny_sdxl, tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(12, 2)}, tmp_path / "f.safetensors"
    )
    cfg = compose(tiny_sdxl, "lora")
    cfg.adapter.init_from = str(tmp_path / "f.safetensors")
    with pytest.raises(ConfigError, match=r"adapter\.init_from can't be used: .*double_blocks.*save_lora_weights"):
        build(cfg)
