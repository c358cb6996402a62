"""Every family from the command line: teacher, masks, rollout, EMA, validation and eval loss together, killed once and
resumed bit for bit, then sampled by tools.generate. Takes minutes, so it is marked slow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
import tiny_families
from commands import assert_same, call, kill_at
from dreambooth_lab.runfolder import RunFolder

BEGIN = ("sdxl_refiner", "deepfloyd_2")  # models that start from an image
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in tiny_families.PIPELINES]


@pytest.fixture(scope="module")
def photo_root(tmp_path_factory):
    """Photos with masks, class images, held-out photos."""
    root = tmp_path_factory.mktemp("photos")
    tiny.save_photos(root / "photos", [(80, 80), (90, 90), (60, 120)])
    tiny.save_photos(root / "class", [(80, 80), (120, 60)], seed=1)
    tiny.save_photos(root / "held", [(80, 80), (60, 120)], seed=5)
    tiny.save_masks(root / "photos", root / "masks")
    return root


def words(name, folder, photo_root, cache):
    """A run with everything on."""
    return [
        f"model={tiny_families.model_of(name)}",
        f"model.pretrained={folder}",
        "model.dtype=float32",
        "model.encoder_dtype=float32",
        "model.tae=null",
        "model.resolution=64",
        "dataset=masked",
        f"dataset.path={photo_root}/photos",
        f"dataset.mask_path={photo_root}/masks",
        'dataset.instance_prompt="a photo of sks dog"',
        'dataset.class_prompt="a photo of dog"',
        "dataset.batch_size=2",
        "prior=teacher",
        f"prior.path={photo_root}/class",
        "adapter.rank=4",
        "adapter.dropout=0.1",
        "trainer.max_steps=20",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "checkpoint.every_n_steps=5",
        "optimizer.lr=1e-3",
        "validation.num_images=1",
        "validation.num_inference_steps=2",
        "validation.every_n_steps=10",
        "ema.enabled=true",
        "logger=none",
        f"cache={cache}",
        "rollout.enabled=true",
        "rollout.ramp_steps=0",
        "rollout.probability=0.5",
        f"eval.path={photo_root}/held",
        "eval.every_n_steps=10",
        "eval.timesteps=4",
        *(["model.options.first_stage=null"] if name == "deepfloyd_2" else []),
    ]


@pytest.mark.parametrize("name", SLOW)
def test_family_trains_resumes_after_a_kill_and_generates(name, photo_root, tmp_path):
    command = words(name, tiny_families.save(name, tmp_path / "model"), photo_root, tmp_path / "cache")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    done = call(*command, cwd=whole)
    assert done.returncode == 0, done.stderr[-3000:]
    kill_at(7, command, broken)
    (run,) = broken.glob("runs/*")
    resumed = call(f"resume={run.relative_to(broken)}", cwd=broken)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    ours, theirs = RunFolder(run), RunFolder(next(whole.glob("runs/*")))
    assert ours.metrics.read_text() == theirs.metrics.read_text()
    a, b = (torch.load(folder.newest()[0], weights_only=True) for folder in (ours, theirs))
    assert a["global_step"] == b["global_step"] == 20
    assert_same(a["state_dict"], b["state_dict"])
    assert any(value.abs().sum() > 0 for key, value in a["state_dict"].items() if "lora_B" in key), "the weights changed"
    draw(run, photo_root, tmp_path, name)


def draw(run, photo_root, tmp_path, name):
    """Images of the export at strengths 0 and 1."""
    size = {"sana": 128, "deepfloyd_2": 64}.get(name, 64)
    begin = [f"image={photo_root}/photos/00.png"] if name in BEGIN else []
    options = [f"run={run}", "prompt=a photo of sks dog", "seeds=1", "strengths=[0,1]", "steps=10", f"resolution={size}", *begin]
    made = call(*options, f"out={tmp_path}/out", cwd=tmp_path, module="dreambooth_lab.tools.generate")
    assert made.returncode == 0, made.stderr[-3000:]
    base, trained = (np.asarray(Image.open(tmp_path / "out" / f"{row:02d}_00.png").convert("RGB")).astype(int) for row in (0, 1))
    assert base.shape == trained.shape and np.abs(base - trained).max() > 0, "the export changes the image"
