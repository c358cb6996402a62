"""The command line, run in processes of its own."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

import tiny
from commands import assert_same, call, kill_at
from dreambooth_lab import lab, sweep
from dreambooth_lab.runfolder import RunFolder


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "dreambooth_lab", *words]


ROLLOUT = ["rollout.enabled=true", "rollout.sampler=unipc", "rollout.ramp_steps=20", "rollout.ramp_shape=cosine",
           "objective.weight=min_snr", "objective.loss=huber", "objective.noise_offset=0.1"]  # fmt: skip
BANK = ["prior=bank", "prior.path=null", "prior.source=generated", "prior.generated.count=2", "prior.bank.draws=2",
        "prior.generated.num_inference_steps=2"]  # fmt: skip


@pytest.mark.parametrize(
    "more", [[], *(pytest.param(words, marks=pytest.mark.slow) for words in (ROLLOUT, BANK))], ids=["plain", "rollout", "bank"]
)
def test_killed_run_resumes_bit_for_bit(small, tmp_path, more):
    """Dropout, accumulation, clipping, cosine, EMA, validation: killed between checkpoints, during accumulation."""
    words = [
        *small, "adapter.dropout=0.3", "trainer.accumulate_grad_batches=2", "optimizer.schedule=cosine", "trainer.max_steps=24",
        "checkpoint.every_n_steps=3", "validation.every_n_steps=8", "dataset.flip=true", "dataset.caption_dropout=0.2",
        f"eval.path={tiny.save_photos(tmp_path / 'held', [(80, 80)], seed=7)}", "eval.every_n_steps=6", "eval.timesteps=2",
        "checkpoint.monitor=eval/loss", *more,
    ]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    done = call(*words, cwd=whole)
    assert done.returncode == 0, done.stderr
    kill_at(8, words, broken)
    (run,) = broken.glob("runs/*")
    assert RunFolder(run).newest()[1] < 24, "it was killed before its end"
    resumed = call(f"resume={run.relative_to(broken)}", cwd=broken)
    assert resumed.returncode == 0, resumed.stderr
    assert list(broken.glob("runs/*")) == [run], "a resumed run stays in its folder"
    ours, theirs = RunFolder(run), RunFolder(next(whole.glob("runs/*")))
    assert ours.metrics.read_text() == theirs.metrics.read_text()
    a, b = (torch.load(f.newest()[0], weights_only=True) for f in (ours, theirs))
    assert a["global_step"] == b["global_step"] == 24
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["callbacks"]["Ema"]["shadow"], b["callbacks"]["Ema"]["shadow"])
    assert_same(a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"])
    assert (run / "eval.csv").read_text() == (theirs.root / "eval.csv").read_text() and ours.best()[1] == theirs.best()[1]
    for step, grid in lab.load(run).images.items():
        assert grid.read_bytes() == lab.load(theirs.root).images[step].read_bytes()


def test_readme_command_runs_end_to_end(tiny_sdxl, tmp_path):
    """`model=sdxl quant=int8 rollout.enabled=true`, with all other defaults except sizes: bfloat16, the shipped photos."""
    small = [f"model.pretrained={tiny_sdxl}", "model.resolution=64", "trainer.max_steps=4", "rollout.ramp_steps=0",
             "validation.num_inference_steps=2", "validation.num_images=1"]  # fmt: skip
    done = call("model=sdxl", "quant=int8", "rollout.enabled=true", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = map(lab.load, lab.runs(tmp_path / "runs").index)
    text = " ".join(run.folder.preflight.read_text().replace("│", " ").split())
    assert "unet in int8" in text and "1 to 4 sampler steps" in text and run.steps == 4
    assert sorted(run.images) == [0, 4] and run.folder.report.is_file()
    files = {path.name for path in run.folder.export.rglob("*")}
    assert {"pytorch_lora_weights.safetensors", "dreambooth.safetensors", "README.md"} <= files
    pipeline = run.pipeline()
    assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.slow
def test_resumed_run_can_be_extended(small, tmp_path):
    quick = [*small, "validation.every_n_steps=0"]
    for words in ([*quick, "trainer.max_steps=4", "name=short"], [*quick, "trainer.max_steps=9", "name=long"]):
        assert call(*words, cwd=tmp_path).returncode == 0
    short, long = (next(tmp_path.glob(f"runs/*_{name}")) for name in ("short", "long"))
    assert call(f"resume={short}", "trainer.max_steps=9", cwd=tmp_path).returncode == 0
    assert RunFolder(short).metrics.read_text() == RunFolder(long).metrics.read_text()


@pytest.mark.slow
def test_multirun_over_prompts_writes_two_complete_runs(small, tmp_path):
    sweep = 'dataset.instance_prompt="a photo of sks dog","a photo of zwx dog"'
    done = call("-m", *[w for w in small if "instance_prompt" not in w], sweep, "trainer.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = [lab.load(path) for path in lab.runs(tmp_path / "runs").index]
    assert [r.config.dataset.instance_prompt for r in runs] == ["a photo of sks dog", "a photo of zwx dog"]
    assert all(r.steps == 2 and r.folder.report.is_file() and (r.folder.export / "pytorch_lora_weights.safetensors").is_file()
               for r in runs)  # fmt: skip
    assert len({r.folder.root.parent for r in runs}) == 1


def test_refused_job_does_not_stop_other_jobs(small, tmp_path, photos):
    empty = tmp_path / "empty"
    empty.mkdir()
    words = [w for w in small if not w.startswith("dataset.path")]
    done = call(
        "-m",
        *words,
        f"dataset.path={empty},{photos}",
        "trainer.max_steps=1",
        "validation.every_n_steps=0",
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "has no usable image" in done.stderr and "Traceback" not in done.stderr
    (run,) = map(lab.load, lab.runs(tmp_path / "runs").index)
    assert run.steps == 1
    (folder,) = tmp_path.glob("runs/*")
    assert [job.state for _, job in sweep.jobs(folder)] == ["failed", "done"]
    assert "has no usable image" in (folder / sweep.PAGE).read_text()
    assert json.loads((folder / sweep.KEYS).read_text()) == ["dataset.path"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=sdxl", "quant=int8", "adapter=full", "dataset.path=."], "needs the weights themselves"),
        (
            ["dataset.path=.", "dataset.instance_prompt=a dog", "model.pretrained=nobody/nothing"],
            "model.pretrained is 'nobody/nothing'",
        ),
        (["resume=."], "is not a run folder"),
    ],
)
def test_refused_configurations_print_short_errors_and_write_no_files(words, message, tmp_path):
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_real_photos_at_two_resolutions(real_photos, small, tmp_path):
    photos = [w for w in small if not w.startswith(("dataset.path", "prior.path"))]
    words = [*photos, f"dataset.path={real_photos / 'dog'}", f"prior.path={real_photos / 'dog2'}",
             "dataset.resolutions=[64,128]", "trainer.max_steps=8"]  # fmt: skip
    kill_at(4, words, tmp_path)
    (folder,) = tmp_path.glob("runs/*")
    done = call(f"resume={folder}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = RunFolder(folder).preflight.read_text()
    assert "instance-64px" in text and "class-128px" in text
    assert lab.load(folder).steps == 8
    shutil.rmtree(folder)
