"""A change rebuilds exactly the cache entries that depend on it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.data.caching import cache
from dreambooth_lab.data.caching.cache import Store
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.factory import build_family
from dreambooth_lab.models.sdxl import SDXL
from dreambooth_lab.storage import durable
from processes import ended, fork


@pytest.fixture
def counted(small, photos, tiny_sdxl, tmp_path, monkeypatch):
    """Prepares data; returns (images encoded, captions encoded)."""
    own, model = shutil.copytree(photos, tmp_path / "own"), shutil.copytree(tiny_sdxl, tmp_path / "model")
    counts = {"images": 0, "texts": 0}
    image, text = SDXL.encode_image, SDXL.encode_text

    def encode_image(self, pixels):
        counts["images"] += len(pixels)
        return image(self, pixels)

    def encode_text(self, captions):
        counts["texts"] += len(captions)
        return text(self, captions)

    monkeypatch.setattr(SDXL, "encode_image", encode_image)
    monkeypatch.setattr(SDXL, "encode_text", encode_text)
    base = [w for w in small if not w.startswith(("dataset.path", "model.pretrained", "prior", "cache"))]

    def files():
        found = (path for kind in ("latents", "text") for path in (tmp_path / "cache" / kind).rglob("*.safetensors"))
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}

    def make(*overrides):
        counts.update(images=0, texts=0)
        before = files()
        words = [*base, f"dataset.path={own}", f"model.pretrained={model}", f"cache={tmp_path / 'cache'}", *overrides]
        cfg = lab.compose(*words)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        after = files()
        if not data.damaged:
            assert all(after[path] == before[path] for path in before), "existing entries are kept"
            assert len(after) - len(before) == counts["images"] + counts["texts"], "encoded entries are new"
        return counts["images"], counts["texts"]

    make.own, make.model, make.cache = own, model, tmp_path / "cache"
    return make


@pytest.mark.slow
def test_each_change_rebuilds_only_its_dependents(counted):
    assert counted() == (5, 3)  # the prompt, the empty prompt and the sampler's unconditional input
    assert counted() == (0, 0)
    with Image.open(counted.own / "01.png") as image:
        image.rotate(180).save(counted.own / "01.png")
    assert counted() == (1, 0), "one image's bytes"
    assert counted("dataset.resolutions=[96]") == (5, 0), "the resolution"
    assert counted("dataset.resolutions=[64,96]") == (0, 0), "both are cached now"
    assert counted("dataset.crop_aspect=square") == (2, 0), "the crop's shape, of the two tall photos"
    assert counted("dataset.crop_aspect=square", "dataset.crop=corner") == (2, 0), "the crop's position"
    assert counted("dataset.flip=true") == (5, 0), "mirrored variants are added"
    assert counted('dataset.instance_prompt="a photo of zwx dog"') == (0, 1), "the caption"
    assert counted("model.encoder_dtype=bfloat16") == (5, 3), "the encoders' precision"
    assert counted() == (0, 0), "earlier entries are kept"
    assert counted("quant.text_encoder_1=int8") == (0, 3), "one text encoder's precision"
    assert counted("model.dtype=bfloat16") == (0, 0), "the denoiser's precision has no effect"
    file = counted.model / "tokenizer/tokenizer.json"
    file.write_text(file.read_text().replace('"lowercase": true', '"lowercase": false') + "\n")
    assert counted() == (0, 3), "the tokenizer"
    file = next((counted.model / "vae").glob("*.safetensors"))
    weights = load_file(file)
    save_file({name: w + 1e-3 if name == "encoder.conv_in.weight" else w for name, w in weights.items()}, file)
    assert counted() == (5, 0), "the VAE's weights"


def test_corruption_is_detected_and_repaired(counted):
    counted()
    store = Store(counted.cache, "latents")
    first, second, third = list(store.keys())[:3]
    store.path(first).write_bytes(store.path(first).read_bytes()[:-9])
    store.path(second).write_bytes(b"")
    store.path(third).unlink()
    assert counted() == (3, 0) and counted() == (0, 0)


def test_damage_after_the_start_is_repaired_when_read(small, photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "own")
    words = [w for w in small if not w.startswith(("dataset.path", "cache", "prior"))]
    cfg = lab.compose(*words, f"dataset.path={own}", f"cache={tmp_path / 'cache'}")
    data = DreamBoothData(cfg, build_family(cfg))
    data.prepare()
    expected = [data.build(data.schedule.batch(n)) for n in range(4)]
    for store in data.stores.all():
        store.read.cache_clear()
        for key in list(store.keys()):
            store.path(key).write_bytes(store.path(key).read_bytes()[:-1] + b"\xff")
    again = [data.build(data.schedule.batch(n)) for n in range(4)]
    for a, b in zip(expected, again, strict=True):
        assert torch.equal(a.latents(), b.latents()) and torch.equal(a.cond["prompt_embeds"], b.cond["prompt_embeds"])
    assert data.stores.damaged > 0


@pytest.mark.parametrize("kind", ["latents", "masks"])
def test_irreparable_damage_names_the_missing_file(small, tmp_path, kind):
    own, masks = (tiny.save_photos(tmp_path / name, [(80, 80)], seed) for name, seed in (("own", 0), ("m", 1)))
    words = [w for w in small if not w.startswith(("dataset.path", "dataset=", "cache", "prior"))]
    cfg = lab.compose(*words, "dataset=masked", f"dataset.path={own}", f"dataset.mask_path={masks}", f"cache={tmp_path / 'c'}")
    data = DreamBoothData(cfg, build_family(cfg))
    data.prepare()
    store = data.stores.masks if kind == "masks" else data.stores.placed[None]
    shutil.rmtree(masks if kind == "masks" else own)
    shutil.rmtree(store.folder)
    store.read.cache_clear()
    with pytest.raises(ConfigError, match=r"00\.png: its .*No such file"):
        data.build(data.schedule.batch(0))


@pytest.fixture
def forked(small, tmp_path):
    """Prepares data of two images in a child process; returns its process id."""
    own = tiny.save_photos(tmp_path / "own", [(80, 80), (60, 120)])
    words = [w for w in small if not w.startswith(("dataset.path", "cache", "prior"))]

    @lru_cache
    def config(*changes):
        return lab.compose(*words, f"dataset.path={own}", f"cache={tmp_path / 'cache'}", *changes)

    def prepared(*changes):
        cfg = config(*changes)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        return data

    def make(*changes, before=lambda: None):
        config(*changes)

        def work():
            before()
            prepared(*changes)

        return fork(work)

    make.here, make.own, make.cache = prepared, own, tmp_path / "cache"
    return make


def test_killed_build_leaves_a_usable_cache(forked):
    tiny.save_photos(forked.own, [(300 + i, 300) for i in range(24)], seed=2)
    child, store = forked("dataset.resolutions=[256]"), Store(forked.cache, "latents")
    deadline = time.monotonic() + 120
    while len(list(store.keys())) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    status = ended(child)
    there = len(list(store.keys()))
    data = forked.here("dataset.resolutions=[256]")
    (summary,) = data.summaries()
    assert status == -signal.SIGKILL and 4 <= there < 24
    assert (summary.cached, summary.built, data.damaged) == (there, 24 - there, 0)


def die_at(number: int, counted: list[int]):
    """Kill the process right before its `number`-th file operation: create, write, rename."""

    def watch(owner, name):
        real = getattr(owner, name)

        def step(*args, **kwargs):
            counted[0] += 1
            if counted[0] == number:
                os._exit(9)
            return real(*args, **kwargs)

        setattr(owner, name, step)

    watch(durable, "_create")
    watch(cache, "save_file")
    watch(Path, "replace")


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_build_killed_at_any_point_leaves_a_usable_cache(forked, stride):
    ends, number = [], 0
    while not ends or ends[-1] == 9:
        number += stride
        shutil.rmtree(forked.cache, ignore_errors=True)
        ends.append(ended(forked(before=lambda n=number: die_at(n, [0]))))
        there = len(list(Store(forked.cache, "latents").keys()))
        data = forked.here()
        (summary,) = data.summaries()
        assert (summary.cached, summary.built, data.damaged) == (there, 2 - there, 0)
        assert data.build(data.schedule.batch(0)).mean.isfinite().all()
    assert ends[-1] == 0 and len(ends) * stride > 3 * (2 + 2), (
        "two images and two captions, three operations each, and the scan cache"
    )


def test_two_processes_can_build_one_cache(forked):
    running = [forked() for _ in range(2)]
    assert [ended(child) for child in running] == [0, 0]
    data = forked.here()
    (summary,) = data.summaries()
    assert (summary.cached, summary.built, data.damaged) == (2, 0, 0)
    assert not list(forked.cache.rglob("*.part"))
