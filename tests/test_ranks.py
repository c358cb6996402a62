"""Several devices: processes on this machine's CPU."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.types import RunMode
from omegaconf import OmegaConf
from torch.testing import assert_close

from dreambooth_lab import __main__ as cli
from dreambooth_lab import lab
from dreambooth_lab.callbacks import validation
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.factory import device_of, leads
from dreambooth_lab.resuming import resume_config
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
        "optimizer.lr=1e-3", "rollout.enabled=true", "rollout.ramp_steps=2", "prior.class_fraction=0.25", "trainer.max_steps=6",
        "checkpoint.keep=null",
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
        assert list(other.series) == list(one.series) and len(other.folder.starts()) == 1
        for name, values in one.series.items():
            assert [step for step, _ in other.series[name]] == [step for step, _ in values], "each line once"
            assert_close([v for _, v in other.series[name]], [v for _, v in values], atol=1e-5, rtol=1e-3)
        assert sorted(other.images) == sorted(one.images) == [0, 3, 6]
        ours, theirs = weights(other.folder, 6), weights(one.folder, 6)
        start = weights(one.folder, 2)
        moved = max(float((theirs[name] - start[name]).abs().max()) for name in theirs)
        assert all(float((ours[name] - theirs[name]).abs().max()) < 0.02 * moved for name in theirs)
        assert (other.folder.export / "pytorch_lora_weights.safetensors").is_file() and other.folder.report.is_file()


UNEVEN = [  # the ranks run the network different numbers of times: rollouts, class rows, an odd number of prompts
    "prior=teacher", "rollout.probability=0.5", "trainer.devices=2", "dataset.batch_size=1", "trainer.accumulate_grad_batches=2",
    "model.gradient_checkpointing=true", "validation.prompts=[a photo of sks robot,a photo of a robot,a robot]",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_divided_weights_train_the_same_to_the_bit(words, tmp_path, quant):
    """DDP and FSDP do the same arithmetic; a resumed run too."""
    sharded = [*words, *UNEVEN, f"quant={quant}", "trainer.strategy=fsdp"]
    call(*words, *UNEVEN, f"quant={quant}", f"hydra.run.dir={tmp_path / 'whole'}", cwd=tmp_path)
    call(*sharded, f"hydra.run.dir={tmp_path / 'divided'}", cwd=tmp_path)
    call(*sharded, "trainer.max_steps=4", f"hydra.run.dir={tmp_path / 'cut'}", cwd=tmp_path)
    call(f"resume={tmp_path / 'cut'}", "trainer.max_steps=6", cwd=tmp_path)
    whole, divided, cut = (lab.load(tmp_path / name) for name in ("whole", "divided", "cut"))
    for other in (divided, cut):
        assert other.series == whole.series and set(other.images) >= set(whole.images) == {0, 3, 6}
        ours, theirs = weights(other.folder, 6), weights(whole.folder, 6)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert all(path.read_bytes() == other.images[step].read_bytes() for step, path in whole.images.items())


@pytest.mark.slow
def test_two_machines_are_one_with_twice_the_batch(words, tmp_path):
    """Two commands, as each machine would start one, on this machine."""
    call(*words, "dataset.batch_size=4", "trainer.max_steps=3", f"hydra.run.dir={tmp_path / 'one'}", cwd=tmp_path)
    said = [*words, "dataset.batch_size=2", "trainer.max_steps=3", "trainer.num_nodes=2", f"hydra.run.dir={tmp_path / 'two'}"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "dreambooth_lab", *said]
    both = [subprocess.Popen(command, cwd=tmp_path, env=env | {"NODE_RANK": str(i)}, stderr=subprocess.PIPE) for i in (0, 1)]
    for process in both:
        _, told = process.communicate(timeout=400)
        assert process.returncode == 0, told.decode()
    one, two = (lab.load(tmp_path / name) for name in ("one", "two"))
    assert len(two.folder.starts()) == 1 and sorted(two.images) == [0, 3]
    for name, values in one.series.items():
        assert_close([v for _, v in two.series[name]], [v for _, v in values], atol=1e-5, rtol=1e-3)


def test_machines_share_a_folder_that_is_named(small, monkeypatch):
    said = {"mode": RunMode.RUN, "runtime": {"output_dir": "x"}, "overrides": {"task": [], "hydra": []}}
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create(said))
    with pytest.raises(ConfigError, match="each machine would choose its own run folder"):
        cli.job(lab.compose(*small, "trainer.num_nodes=2"))


@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit(words, tmp_path):
    two = ["trainer.devices=2", "dataset.batch_size=1"]
    call(*words, *two, f"hydra.run.dir={tmp_path / 'whole'}", cwd=tmp_path)
    call(*words, *two, "trainer.max_steps=4", f"hydra.run.dir={tmp_path / 'cut'}", cwd=tmp_path)
    call(f"resume={tmp_path / 'cut'}", "trainer.max_steps=6", cwd=tmp_path)
    whole, cut = (weights(RunFolder(tmp_path / name), 6) for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_samples(words, tmp_path):
    """Two ranks of 2 rows, then one of 4, and the other way round: the losses of one in one go."""
    how = {1: ["trainer.devices=1", "dataset.batch_size=4"], 2: ["trainer.devices=2", "dataset.batch_size=2"]}
    call(*words, *how[1], f"hydra.run.dir={tmp_path / 'whole'}", cwd=tmp_path)
    whole = lab.load(tmp_path / "whole")
    for first, then in ((2, 1), (1, 2)):
        root = tmp_path / f"from_{first}"
        call(*words, *how[first], "trainer.max_steps=3", f"hydra.run.dir={root}", cwd=tmp_path)
        call(f"resume={root}", *how[then], "trainer.max_steps=6", cwd=tmp_path)
        went_on = lab.load(root)
        for name, values in whole.series.items():
            assert [step for step, _ in went_on.series[name]] == [step for step, _ in values]
            assert_close([v for _, v in went_on.series[name]], [v for _, v in values], atol=1e-5, rtol=1e-3)
        assert went_on.config.trainer.devices == then


@pytest.mark.slow
def test_ranks_share_the_images_and_caches_are_built_once(words, tmp_path):
    """Each rank draws its own prompts, the first saves all; what the second rank reads of the caches, the first has made."""
    prompts = "validation.prompts=[a dog, sks dog, a cat]"
    for i in (1, 2):
        how = [f"trainer.devices={i}", f"dataset.batch_size={4 // i}", f"cache={tmp_path / f'cache{i}'}"]
        call(*words, *how, prompts, f"hydra.run.dir={tmp_path / str(i)}", cwd=tmp_path)
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1/images").rglob("step_*/*.png"))
    assert len(files) == 3 * 3 * 2 and all((tmp_path / "2" / file).is_file() for file in files)
    for file in files:
        if "step_0000000" in str(file):
            assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), "of the base model, to the bit"
    made = [path for part in ("latents", "text") for path in (tmp_path / "cache2" / part).rglob("*.safetensors")]
    starts = RunFolder(tmp_path / "2").preflight.stat().st_mtime  # the other rank begins after that
    assert made and all(path.stat().st_mtime <= starts for path in made)


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
    assert_close([v for _, v in two.series["eval/loss"]], [v for _, v in one.series["eval/loss"]], atol=1e-4, rtol=1e-3)
    assert len(one.series["eval/loss"]) == 4 and one.folder.best()[1] == two.folder.best()[1]
    assert len((tmp_path / "2" / "eval.csv").read_text().splitlines()) == 1 + 6 * len(two.series["eval/loss"])


@pytest.mark.slow
def test_a_sweep_has_one_device_each(words, tmp_path):
    asked = ["-m", *words, "trainer.devices=2", "seed=0,1", f"runs={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "dreambooth_lab", *asked], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and "trainer.devices is 2 in a sweep" in done.stderr


def test_a_rank_has_its_own_gpu_and_there_are_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("auto", 2) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of("gpu", 2) == torch.device("cuda", 1) and device_of("cpu", 2) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"trainer.devices is 3, but torch finds 2 CUDA"):
        device_of("gpu", 3)


def test_apples_gpu_is_taken_where_there_is_one_and_none_of_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="'mps', but torch finds no MPS device"):
        device_of("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of("auto") == device_of("mps") == torch.device("mps") and device_of("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"trainer.devices is 2, but MPS has only one device"):
        device_of("auto", 2)
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        device_of("gpu")


def test_the_first_process_of_all_machines_writes(monkeypatch):
    for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    assert leads()
    for variables in ({"NODE_RANK": "1"}, {"LOCAL_RANK": "1"}, {"SLURM_LOCALID": "1"}, {"LOCAL_RANK": "0", "GROUP_RANK": "1"}):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert not leads()


def test_rows_may_be_divided_otherwise_but_not_changed(small, tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_config(lab.compose(*small, "dataset.batch_size=4"))
    folder.checkpoints.mkdir()
    folder.checkpoint(1).touch()
    words = ["trainer.devices=2", "dataset.batch_size=2"]
    again = resume_config(lab.compose(*small, f"resume={tmp_path}", *words), words)
    assert (again.trainer.devices, again.dataset.batch_size) == (2, 2)
    with pytest.raises(ConfigError, match=r"trainer.devices was 1, now 2") as caught:
        resume_config(lab.compose(*small, f"resume={tmp_path}", words[0]), words[:1])
    assert "may change if their product stays 4" in str(caught.value)


def test_an_unknown_strategy_is_refused(small):
    with pytest.raises(ConfigError, match="must be auto, ddp or fsdp; fsdp divides frozen weights"):
        check(lab.compose(*small, "trainer.strategy=deepspeed_stage_3"))


def test_a_rank_that_fails_to_draw_is_told_to_the_first(monkeypatch):
    """And no rank waits for another."""

    def other(own, parts):
        parts[1] = ({1: ["b"]}, "disk full")

    monkeypatch.setattr(validation.dist, "gather_object", other)
    first = SimpleNamespace(world_size=2, is_global_zero=True, strategy=SimpleNamespace(barrier=lambda name: None))
    assert validation.gathered({0: ["a"]}, "", first) == ({0: ["a"], 1: ["b"]}, "disk full")


def weights(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return torch.load(folder.checkpoint(step), weights_only=True)["state_dict"]
