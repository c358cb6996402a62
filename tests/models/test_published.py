"""The published sizes of every family, on the meta device: parameters, adapted layers, and the size of a LoRA of rank 16.

The table of docs/models.md is `python tests/models/test_published.py`."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers as D
import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn

from dreambooth_lab.adapter import kohya
from dreambooth_lab.adapter.base import matching_layers
from dreambooth_lab.config import conf_dir
from programs import COMFYUI, UNREAD
from published import MEDIUM, PUBLISHED

PARENT = {"sd35_medium": "sd3"}  # model → its family, if named differently


class Sizes:
    """Parameter counts of a family's published denoiser."""

    def __init__(self, name: str):
        kind, settings, self.published = PUBLISHED[name]
        family = family_of(name)
        with torch.device("meta"):
            model = kind(**settings)
        self.parameters = sum(p.numel() for p in model.parameters())
        parts = [ending for group in ("attention", "feed_forward") for ending in family.target_modules.get(group, ())]
        self.layers = matching_layers(model, parts)
        self.lora = sum(16 * _sides(model.get_submodule(layer)) for layer in self.layers)
        within = {
            n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(part.isdigit() for part in n.split("."))
        }
        self.covered = sum(model.get_submodule(n).weight.numel() for n in within & set(self.layers))
        self.linear = sum(model.get_submodule(n).weight.numel() for n in within)


def family_of(name: str) -> Any:
    return get_class(OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")._target_)


def _sides(layer: Any) -> int:
    return layer.weight.shape[0] + layer.weight[0].numel()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_match_publication_and_targets_cover_most_block_weights(name):
    sizes = Sizes(name)
    assert sizes.parameters / 1e9 == pytest.approx(sizes.published, rel=0.01)
    assert sizes.layers and sizes.covered > (0.5 if name == "deepfloyd_1" else 0.6) * sizes.linear


CASES = [(name, program) for name in COMFYUI for program in family_of(PARENT.get(name, name)).programs]
MISSED = {("sdxl", "A1111"): {"lora_unet_up_blocks_0_upsamplers_0_conv"}}  # of convolutions, by its own arithmetic


@cache
def written(name: str) -> tuple[set[str], int]:
    """Names of all trainable layers of a full-size model in the file for other programs, for LoRA and LyCORIS."""
    kind, settings, _ = PUBLISHED.get(name) or (D.SD3Transformer2DModel, MEDIUM, 0)
    family = family_of(PARENT.get(name, name))
    with torch.device("meta"):
        layers = matching_layers(kind(**settings), [ending for group in family.target_modules.values() for ending in group])
    part = "unet" if kind is D.UNet2DConditionModel else "transformer"
    one = {f"{layer}.lora_{which}.weight": torch.zeros(1) for layer in layers for which in "AB"}
    if not family.kohya:
        return {f"{part}.{layer}" for layer in layers}, len(layers)
    keys = kohya.convert(family.kohya[part], one, dict.fromkeys(layers, 1.0), 1.0)
    return {key.partition(".")[0] for key in keys}, len(layers)


@pytest.mark.parametrize(("name", "program"), CASES)
def test_listed_programs_know_every_trained_layer(name, program):
    names, layers = written(name)
    assert len(names) == layers, "no two layers share a name"
    assert UNREAD[program](name, names) == MISSED.get((name, program), set())


def test_models_without_listed_programs_are_read_by_none():
    """Lumina 2's names are not among those that ComfyUI's table for it has, which are Z-Image's."""
    names, _ = written("lumina2")
    assert not family_of("lumina2").programs and not names & COMFYUI["z_image"]


if __name__ == "__main__":
    print("| model= | denoiser, B parameters | adapted layers | LoRA of rank 16, M parameters |\n|---|---|---|---|")
    for name in PUBLISHED:
        sizes = Sizes(name)
        print(f"| `{name}` | {sizes.parameters / 1e9:.2f} | {len(sizes.layers)} | {sizes.lora / 1e6:.1f} |")
