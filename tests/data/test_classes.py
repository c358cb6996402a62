"""Class pictures that the base model draws, and the photos under the class prompt."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_lab import lab
from dreambooth_lab.data.class_images import class_folder, generate
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.factory import build_family
from dreambooth_lab.models.sdxl import SDXL


@pytest.fixture
def setting(small, tmp_path):
    def make(*overrides):
        words = [w for w in small if not w.startswith(("prior.path", "cache="))]
        few = ["prior.source=generated", "prior.generated.count=3", "prior.generated.batch_size=2"]
        cfg = lab.compose(*words, *few, "prior.generated.num_inference_steps=2", f"cache={tmp_path}", *overrides)
        return cfg, build_family(cfg)

    return make


def image_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_generated_class_images_match_the_pipeline(setting):
    cfg, family = setting("prior.generated.negative_prompt=blurry")
    drawn = Image.open(sorted(generate(cfg, family).iterdir())[2])
    from dreambooth_lab import draw
    from dreambooth_lab.draw import Purpose

    seed = draw.torch_seed(0, 2, Purpose.CLASS_IMAGE)
    text, negative = family.encode_text(["a photo of a dog"]), family.encode_text(["blurry"])
    own = family.generate(text, negative, height=64, width=64, num_inference_steps=2, guidance_scale=5.0,
                          generator=torch.Generator().manual_seed(seed))[0]  # fmt: skip
    assert drawn.size == (64, 64) and drawn.tobytes() == own.tobytes()


def test_generated_image_is_independent_of_its_batch(setting, tmp_path):
    """But for the last bits, in which kernels differ between batch sizes."""

    def levels(size):
        folder = generate(*setting(f"cache={tmp_path / size}", f"prior.generated.batch_size={size}"))
        return np.stack([np.asarray(Image.open(path), dtype=int) for path in sorted(folder.iterdir())])

    whole, single = levels("3"), levels("1")
    assert abs(whole - single).max() <= 1
    assert abs(whole - whole[[1, 2, 0]]).mean() > 5, "and they are different pictures"


def test_second_run_generates_nothing_and_a_larger_count_only_the_rest(setting, monkeypatch):
    first = image_bytes(generate(*setting()))
    counted, real = [], SDXL.generate
    monkeypatch.setattr(SDXL, "generate", lambda self, text, *a, **k: counted.append(text.rows) or real(self, text, *a, **k))
    assert image_bytes(generate(*setting())) == first and not counted
    more = image_bytes(generate(*setting("prior.generated.count=5")))
    assert more[:3] == first and len(more) == 5 and sum(counted) == 2
    assert image_bytes(generate(*setting("prior.generated.count=2"))) == first[:2]


def test_interrupted_generation_continues(setting, monkeypatch):
    cfg, family = setting("prior.generated.count=5")
    whole = image_bytes(generate(cfg, family))
    shutil.rmtree(Path(cfg.cache) / "class_pictures")
    real, calls = SDXL.generate, []

    def breaks(self, *args, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, *args, **options)

    monkeypatch.setattr(SDXL, "generate", breaks)
    with pytest.raises(KeyboardInterrupt):
        generate(cfg, family)
    kept = list((Path(cfg.cache) / "class_pictures").rglob("*.png"))
    assert len(kept) == 2
    monkeypatch.setattr(SDXL, "generate", real)
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert image_bytes(generate(cfg, family)) == whole
    assert times == {path: path.stat().st_mtime_ns for path in kept}, "what was drawn is kept"


@pytest.mark.slow
@pytest.mark.parametrize("change", ["prior.generated.guidance_scale=2", "prior.generated.negative_prompt=x",
                                    "prior.prompt=a cat", "prior.generated.seed=1"])  # fmt: skip
def test_changed_settings_generate_new_images(setting, change):
    assert image_bytes(generate(*setting())) != image_bytes(generate(*setting(change)))


def test_run_trains_on_generated_class_images(setting):
    cfg, family = setting()
    data = DreamBoothData(cfg, family)
    data.prepare()
    assert {s.spec.id: s.found for s in data.summaries()}["class-64px"] == 3
    assert all(bucket.classes for bucket in data.schedule.buckets)


def test_source_captions_uses_the_photos_with_the_class_prompt(setting, photos):
    cfg, family = setting("prior.source=captions")
    assert class_folder(cfg, family) == str(photos)
    data = DreamBoothData(cfg, family)
    data.prepare()
    mine = {e.picture.name for e in data.entries if e.spec.is_class}
    assert mine == {e.picture.name for e in data.entries if not e.spec.is_class}
    assert sum(s.built for s in data.summaries()) <= len(
        {data.cache_reader.key(e, i) for e in data.entries for i in range(len(e.variants))}
    ), "their latents are shared"
    assert {e.captions for e in data.entries if e.spec.is_class} == {("a photo of a dog",)}


def test_source_blank_uses_the_photos_with_empty_or_class_prompt(setting):
    cfg, family = setting("prior.source=blank")
    data = DreamBoothData(cfg, family)
    data.prepare()
    mine = {e.picture.name for e in data.entries if e.spec.is_class}
    assert mine == {e.picture.name for e in data.entries if not e.spec.is_class}
    stream = iter(Samples(data, data.schedule, 0, 0, 1))
    counts = Counter(b.captions[i] for b in (next(stream) for _ in range(60)) for i in b.class_rows.tolist())
    assert set(counts) == {"", "a photo of a dog"} and min(counts.values()) > 0.3 * counts.total(), "about half of each"
    cfg, family = setting("prior.source=blank", "prior.prompt=null")
    data = DreamBoothData(cfg, family)
    data.prepare()
    assert {e.captions for e in data.entries if e.spec.is_class} == {("",)}


def test_bank_of_blank_rows_stores_predictions_for_each_rows_caption(setting):
    cfg, family = setting("prior.source=blank", "prior=bank", "prior.bank.draws=2")
    data = DreamBoothData(cfg, family)
    data.prepare()
    stream, seen = iter(Samples(data, data.schedule, 0, 0, 1)), set()
    for batch in (next(stream) for _ in range(12)):
        for row, teacher_output in zip(
            batch.class_rows.tolist(), batch.teacher_output if len(batch.class_rows) else (), strict=True
        ):
            one = torch.tensor([row])
            with torch.no_grad():
                x_t = family.path.noise(batch.latents()[one], batch.eps[one], batch.u[one])
                own = family.denoise(x_t, batch.u[one], batch.cond.select(one))[0]
            torch.testing.assert_close(teacher_output, own, atol=1e-5, rtol=1e-5)
            seen.add(batch.captions[row])
    assert seen == {"", "a photo of a dog"}
