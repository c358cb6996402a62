from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REAL_PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "dreambooth"


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.save_sdxl(tmp_path_factory.mktemp("tiny-sdxl"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a tiny family → its checkpoint's folder, created on first use."""
    import tiny_families

    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: tiny_families.save(name, root / name))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three square and two tall photos: two buckets."""
    import tiny

    return tiny.save_photos(tmp_path_factory.mktemp("photos"), [(80, 80), (90, 90), (100, 100), (60, 120), (50, 100)])


@pytest.fixture(scope="session")
def class_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.save_photos(tmp_path_factory.mktemp("class"), [(80, 80), (120, 60), (70, 70)], seed=1)


@pytest.fixture(scope="session")
def small(tiny_sdxl: Path, photos: Path, class_photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run on the tiny model that takes seconds: teacher prior, two buckets."""
    return [
        "model=sdxl", f"model.pretrained={tiny_sdxl}", "model.dtype=float32", "model.tae=null",
        "model.resolution=64",
        "dataset=folder", f"dataset.path={photos}",
        'dataset.instance_prompt="a photo of sks dog"', 'dataset.class_prompt="a photo of a dog"',
        "dataset.batch_size=2", "prior=teacher", f"prior.path={class_photos}", "adapter.rank=4",
        "trainer.max_steps=6", "trainer.accelerator=cpu", "trainer.progress=false", "checkpoint.every_n_steps=2",
        "optimizer.lr=1e-2", "validation.num_images=2", "validation.num_inference_steps=2", "validation.every_n_steps=3",
        "ema.enabled=true", "ema.validation=none", "logger=none", f"cache={tmp_path_factory.mktemp('cache')}",
    ]  # fmt: skip


@pytest.fixture
def real_photos() -> Path:
    if not REAL_PHOTOS.is_dir():
        pytest.skip("the DreamBooth paper's photos are not here")
    return REAL_PHOTOS
