"""Several devices: processes on this machine's CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.run import _device
from dreambooth_lab.runfolder import RunFolder


def call(*words: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-m", "dreambooth_lab", *words], capture_output=True, text=True, cwd=cwd, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def words(small, photos, class_photos, tmp_path_factory):
    """One bucket, so that a sample is the same picture at every batch size; a quarter of the rows are class rows."""
    folder = tmp_path_factory.mktemp("one")
    for own, name in ((photos, "photos"), (class_photos, "class")):
        (folder / name).mkdir()
        for i in range(3):
            shutil.copy(own / ("00.png", "00.png", "02.png")[i], folder / name / f"{i}.png")
    return [
        *small, f"dataset.path={folder / 'photos'}", f"prior.path={folder / 'class'}", "dataset.crop_aspect=square",
        "optimizer.lr=1e-3", "rollout.enabled=true", "rollout.ramp_steps=2", "prior.share=0.25", "trainer.max_steps=6",
        "checkpoint.keep_all=true",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_are_one_with_twice_the_batch(words, tmp_path):
    """The same losses, pictures and, but for rounding, weights; each cut with micro-batches that lack a kind of rows."""
    cut = [("trainer.devices=1", "dataset.batch_size=4"), ("trainer.devices=2", "dataset.batch_size=2"),
           ("trainer.devices=2", "dataset.batch_size=1", "trainer.accumulate_grad_batches=2")]  # fmt: skip
    said = [call(*words, *how, f"hydra.run.dir={tmp_path / str(i)}", cwd=tmp_path) for i, how in enumerate(cut)]
    one, *others = (lab.load(tmp_path / str(i)) for i in range(3))
    for other, text in zip(others, said[1:], strict=True):
        assert text.count("Training") == 1 and "cpu and 1 more" in text, "the first rank alone speaks"
        assert list(other.metrics) == list(one.metrics) and len(other.folder.starts()) == 1
        for name, values in one.metrics.items():
            assert [step for step, _ in other.metrics[name]] == [step for step, _ in values], "each line once"
            assert_close([v for _, v in other.metrics[name]], [v for _, v in values], atol=1e-5, rtol=1e-3)
        assert sorted(other.pictures) == sorted(one.pictures) == [0, 3, 6]
        ours, theirs = weights(other.folder, 6), weights(one.folder, 6)
        start = weights(one.folder, 2)
        moved = max(float((theirs[name] - start[name]).abs().max()) for name in theirs)
        assert all(float((ours[name] - theirs[name]).abs().max()) < 0.02 * moved for name in theirs)
        assert (other.folder.export / "pytorch_lora_weights.safetensors").is_file() and other.folder.report.is_file()


@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit(words, tmp_path):
    two = ["trainer.devices=2", "dataset.batch_size=1"]
    call(*words, *two, f"hydra.run.dir={tmp_path / 'whole'}", cwd=tmp_path)
    call(*words, *two, "trainer.max_steps=4", f"hydra.run.dir={tmp_path / 'cut'}", cwd=tmp_path)
    call(f"resume={tmp_path / 'cut'}", "trainer.max_steps=6", cwd=tmp_path)
    whole, cut = (weights(RunFolder(tmp_path / name), 6) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_ranks_share_the_eval_loss_and_agree_on_the_best(words, tmp_path):
    """The same exams whoever asks them; the first rank's numbers decide for all."""
    import tiny

    held = tiny.save_photos(tmp_path / "held", [(80, 80), (90, 90), (60, 120)], seed=7)
    asked = [f"eval.path={held}", "eval.every_n_steps=2", "eval.timesteps=2", "checkpoint.monitor=eval/loss",
             "validation.every_n_steps=20"]  # fmt: skip
    for i in (1, 2):
        how = [f"trainer.devices={i}", f"dataset.batch_size={2 // i}", f"hydra.run.dir={tmp_path / str(i)}"]
        call(*words, *asked, *how, cwd=tmp_path)
    one, two = (lab.load(tmp_path / str(i)) for i in (1, 2))
    assert_close([v for _, v in two.metrics["eval/loss"]], [v for _, v in one.metrics["eval/loss"]], atol=1e-4, rtol=1e-3)
    assert len(one.metrics["eval/loss"]) == 4 and one.folder.best()[1] == two.folder.best()[1]
    assert len((tmp_path / "2" / "eval.csv").read_text().splitlines()) == 1 + 6 * len(two.metrics["eval/loss"])


@pytest.mark.slow
def test_a_sweep_has_one_device_each(words, tmp_path):
    asked = ["-m", *words, "trainer.devices=2", "seed=0,1", f"runs={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "dreambooth_lab", *asked], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and "trainer.devices is 2 in a sweep" in done.stderr


def test_a_rank_has_its_own_gpu_and_there_are_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _device("auto", 2) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert _device("gpu", 2) == torch.device("cuda", 1) and _device("cpu", 2) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"trainer.devices is 3, but torch sees 2 CUDA"):
        _device("gpu", 3)


def weights(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return torch.load(folder.checkpoint(step), weights_only=True)["state_dict"]
