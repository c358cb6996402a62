"""What is drawn while a run trains, and what of it depends on how much fits."""

import json
import shutil
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import torch

from dreambooth_lab import lab
from dreambooth_lab.callbacks.validation import Validation
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.factory import attach, build_adapter, build_family
from dreambooth_lab.profiling import memory
from dreambooth_lab.runfolder import RunFolder


class Sent:
    """Previews that note which picture is told of."""

    def __init__(self):
        self.firsts = []

    def on_step(self, facts, seeds, first):
        self.firsts.append((first, list(seeds)))

    def done(self, paths, facts, seeds):
        self.paths = paths


def drawn(small, folder, size):
    cfg = lab.compose(*small, "validation.num_images=5", f"validation.batch_size={size}", "validation.prompts=[a dog]")
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    adapter = build_adapter(cfg)
    attach(cfg, family, adapter, None)
    module, sent = DreamBooth(cfg, family, adapter), Sent()
    validation = Validation(None, cfg.validation, data, RunFolder(folder), None, sent, None)
    images = validation._draw_all(0, "live", folder, SimpleNamespace(global_rank=0, world_size=1, is_global_zero=True), module)[0]
    return [np.asarray(image).astype(int) for image in images], sent


def test_an_image_does_not_depend_on_how_many_are_sampled_with_it(small, tmp_path):
    """Its noise is its own. Kernels add in another order for other numbers of rows, which may round a level up or down."""
    alone, told = drawn(small, tmp_path / "a", 1)
    assert told.firsts == [(i, [i]) for i in range(5)] and len(told.paths) == 5
    some, told = drawn(small, tmp_path / "b", 2)
    assert told.firsts == [(0, [0, 1]), (2, [2, 3]), (4, [4])]
    for other in (some, drawn(small, tmp_path / "c", 5)[0]):
        assert all(abs(one - two).max() <= 1 for one, two in zip(alone, other, strict=True))
    assert all(abs(one - two).max() > 20 for one, two in combinations(alone, 2))


def test_the_vae_sees_one_picture_at_a_time(small, monkeypatch):
    family = build_family(lab.compose(*small))
    rows = []
    for verb in ("encode", "decode"):
        real = getattr(family.vae, verb)
        monkeypatch.setattr(family.vae, verb, lambda x, *a, real=real, **k: rows.append(len(x)) or real(x, *a, **k))
    mean, _ = family.encode_image(torch.rand(3, 3, 64, 64) * 2 - 1)
    pixels = family.decode(mean)
    family.preview(mean)
    assert len(mean) == len(pixels) == 3 and rows == [1] * 9
    assert torch.equal(family.decode(mean[1:2]), pixels[1:2])


def test_tiles_need_less_memory_and_are_another_encoder(small, tiny_sdxl, tmp_path):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "large")
    settings = folder / "vae" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"sample_size": 1024}))  # as SDXL's
    words = [*small, f"model.pretrained={folder}"]
    plain, tiled = (build_family(lab.compose(*words, f"model.vae_tiling={said}")) for said in ("false", "true"))
    assert plain.image_identity() != tiled.image_identity()
    latents = torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    needs = [memory.peak(lambda f=f: f.decode(latents), f.device) for f in (plain, tiled)]
    assert needs[1] < 0.6 * needs[0]
    assert tiled.decode(latents).shape == plain.decode(latents).shape
