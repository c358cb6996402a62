"""Every adapter on every base: forward, backward, three optimiser steps, save, load, the same prediction; or a ConfigError."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.adapter import ExportWeights, Form
from dreambooth_lab.batch import Cond
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import build_adapter, build_family

ADAPTERS = ("lora", "dora", "locon", "loha", "lokr", "oft", "full")
LIBRARIES = {
    "torchao": "torchao",
    "nf4": "bitsandbytes",
    "int8": "optimum",
    "int4": "optimum",
    "int2": "optimum",
    "fp8": "optimum",
}
ALL = Form("kohya", torch.float32, tuple(enums.Format))
CELLS = list(product(ADAPTERS, [kind.name for kind in enums.QuantKind], ["float32", "bfloat16"]))


# Combinations in every run of the suite: each adapter without quantisation, and each quantisation with one adapter.
QUICK = {
    "int8": ("lora", "bfloat16"), "int4": ("dora", "float32"), "int2": ("locon", "float32"), "fp8": ("loha", "bfloat16"),
    "nf4": ("lora", "bfloat16"), "int8_torchao": ("lokr", "bfloat16"), "int4_torchao": ("locon", "bfloat16"),
    "fp8_torchao": ("dora", "float32"),
}  # fmt: skip


def cell(adapter: str, kind: str, dtype: str):
    """A combination; marked slow if another combination covers most of it."""
    quick = kind == "none" or QUICK[kind] == (adapter, dtype)
    return pytest.param(adapter, kind, dtype, marks=() if quick else pytest.mark.slow)


def works(adapter: str, kind: str, dtype: str) -> bool:
    """The table that docs/quantised.md shows."""
    if adapter == "full":
        return kind == "none"
    if adapter == "oft":
        return kind == "none"
    if adapter == "dora" and dtype == "bfloat16":
        return kind not in ("int8", "int4", "int2", "fp8")
    return True


@cache
def composed(tiny_sdxl, adapter):
    return lab.compose("model=sdxl", f"model.pretrained={tiny_sdxl}", "model.resolution=64", "dataset=folder", "dataset.path=.",
                       "dataset.instance_prompt=a photo of sks dog",
                       "quant.cache=false", f"adapter={adapter}", "adapter.alpha=3", "trainer.accelerator=cpu",
                       f"adapter.rank={1 if adapter == 'full' else 4}")  # fmt: skip


def compose(tiny_sdxl, adapter, kind="none", dtype="float32"):
    """The composed configuration, cached: composing takes longer than a combination's test."""
    cfg = composed(tiny_sdxl, adapter).copy()
    cfg.quant.kind, cfg.model.dtype = enums.QuantKind[kind], enums.Dtype[dtype]
    return cfg


def build(cfg, seed=0):
    family, adapter = build_family(cfg), build_adapter(cfg)
    layers = adapter.attach(family.denoiser, family.target_modules, seed)
    if cfg.adapter.init_from:
        adapter.load_weights(Path(cfg.adapter.init_from))
    return DreamBooth(cfg, family, adapter).train(), layers


def learned(module, header=(("steps", "3"),)):
    """The module's trained weights, as the export receives them."""
    owned = module.by_owner(module.trainable_parameters())
    return ExportWeights("unet", owned.pop("unet"), owned, dict(header), module.family.kohya, ALL)


def question(device="cpu"):
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device)  # noqa: E731
    size = torch.full((2, 6), 64.0, device=device)
    cond = Cond(prompt_embeds=draw(2, 77, 24), pooled_prompt_embeds=draw(2, 16), size=size)
    return draw(2, 4, 8, 8), torch.tensor([0.2, 0.7], device=device), cond


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("adapter", "kind", "dtype"), [cell(*one) for one in CELLS if works(*one)])
def test_supported_combination_trains_saves_loads_and_predicts_the_same(adapter, kind, dtype, device, tiny_sdxl, tmp_path):
    for library in [LIBRARIES[kind.rpartition("_")[2]]] if kind != "none" else []:
        if not find_spec(library):
            pytest.skip(f"{library} is not installed")
    cfg = compose(tiny_sdxl, adapter, kind, dtype)
    cfg.trainer.accelerator = "gpu" if device == "cuda" else device
    check(cfg)
    module, layers = build(cfg)
    ask = question(device)
    with torch.no_grad(), module.adapter.base():
        base = module.predict(*ask)
    learning = module.trainable_parameters()
    own = enums.Dtype[dtype] if adapter == "full" else enums.Dtype.float32
    assert layers and learning and all(p.dtype is getattr(torch, own.name) for p in learning.values())
    cfg.optimizer.lr = 1e-2
    optimizer = module.configure_optimizers()["optimizer"]
    for _ in range(3):
        optimizer.zero_grad()
        (module.predict(*ask) - 1).square().mean().backward()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        trained = module.predict(*ask)
        with module.adapter.base():
            assert torch.equal(module.predict(*ask), base), "without its adapter it is bit-identical to the base"
    assert (trained - base).abs().max() > 1e-3, "the weights changed"
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    again, _ = build(cfg, seed=7)
    again.load_state_dict(checkpoint["state_dict"], strict=False)
    module.adapter.export(tmp_path / "export", learned(module))
    cfg.adapter.init_from = str(tmp_path / "export")
    continued, _ = build(cfg, seed=8)
    with torch.no_grad():
        assert torch.equal(again.eval().predict(*ask), trained), "the checkpoint is bit-identical"
        assert_close(continued.eval().predict(*ask), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("adapter", "kind", "dtype"), [cell for cell in CELLS if not works(*cell)])
def test_unsupported_combinations_are_refused_with_the_reason(adapter, kind, dtype, tiny_sdxl):
    with pytest.raises(ConfigError, match=r"needs the weights themselves|can't mix"):
        check(compose(tiny_sdxl, adapter, kind, dtype))


@pytest.mark.parametrize("adapter", ["lora", "locon", "full"])
def test_init_from_a_mismatched_file_is_refused(adapter, tiny_sdxl, tmp_path):
    cfg = compose(tiny_sdxl, adapter)
    cfg.adapter.parts = ["attention"]
    module, _ = build(cfg)
    module.adapter.export(tmp_path / "export", learned(module))
    cfg.adapter.init_from = str(tmp_path / "export")
    if adapter == "full":
        weights = next((tmp_path / "export").rglob("*.safetensors"))
        save_file({"other": torch.zeros(1)}, weights)
    else:
        cfg.adapter.parts = ["attention", "feed_forward"]
    with pytest.raises(ConfigError, match=r"adapter\.init_from is .*export"):
        build(cfg)
    for key in {"lora": ["rank"], "locon": ["rank", "alpha"], "full": []}[adapter]:
        other = compose(tiny_sdxl, adapter)
        other.adapter.parts, other.adapter.init_from, other.adapter[key] = ["attention"], cfg.adapter.init_from, 2
        with pytest.raises(ConfigError, match=rf"adapter\.init_from is .*export.*{'alpha' if key == 'alpha' else ''}"):
            build(other)
    cfg.adapter.init_from = str(tmp_path)
    with pytest.raises(ConfigError, match=r"adapter\.init_from .*(can't be read|lacks|holds 0 safetensors)"):
        build(cfg)
