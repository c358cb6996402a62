"""Runs stopped by signals, other processes, damaged files, full disks and non-finite values."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from commands import assert_same, call, kill_at, start, wait_for
from dreambooth_lab import lab
from dreambooth_lab.callbacks import finite
from dreambooth_lab.config import ConfigError, RunError
from dreambooth_lab.dreambooth import DreamBooth
from dreambooth_lab.run import release, run
from dreambooth_lab.runfolder import RunFolder, new_folder

QUICK = ["validation.every_n_steps=0", "ema.enabled=false"]


def here(words: list[str], root: Path) -> RunFolder:
    """A run in this process, which has imported the libraries already."""
    run(lab.compose(*words), root)
    return RunFolder(root)


def resume(path: Path, **changes: int) -> RunFolder:
    cfg = RunFolder(path).saved_config()
    cfg.resume = str(path)
    for key, value in changes.items():
        cfg.trainer[key] = value
    run(cfg, path)
    return RunFolder(path)


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1))],
    ids=lambda n: n.name,
)
def test_signal_saves_exports_and_prints_how_to_resume(number, small, tmp_path):
    words = [*small, *QUICK, "trainer.max_steps=30", "checkpoint.every_n_steps=1000", "trainer.accumulate_grad_batches=2"]
    process = start(*words, cwd=tmp_path)
    path = wait_for(5, tmp_path, process)
    process.send_signal(number)
    _, output = process.communicate(timeout=120)
    folder = RunFolder(path)
    _, step = folder.newest()
    assert process.returncode == 128 + number and f"stopped at step {step} and saved; resume with" in output
    assert f"resume={path}" in output and "Traceback" not in output
    assert 5 <= step < 30 and (folder.export / "pytorch_lora_weights.safetensors").is_file()
    assert max(line[0] for line in folder.read_metrics()) == step, "no finished step is lost"
    resume(path)
    theirs = here(words, tmp_path / "whole")
    assert folder.metrics.read_text() == theirs.metrics.read_text()
    a, b = (torch.load(f.newest()[0], weights_only=True) for f in (folder, theirs))
    assert_same(a["state_dict"], b["state_dict"])


def test_second_signal_stops_immediately(small, tmp_path):
    process = start(
        *small, "trainer.max_steps=500", "validation.num_inference_steps=1", "validation.every_n_steps=0", cwd=tmp_path
    )
    wait_for(2, tmp_path, process)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    _, output = process.communicate(timeout=60)
    assert process.returncode in (130, 128 + signal.SIGINT, 128 + signal.SIGTERM) and "Traceback" not in output


def test_requeued_command_resumes(small, tmp_path):
    words = [*small, *QUICK, "trainer.max_steps=20", "checkpoint.every_n_steps=4", "resume=auto"]
    process = start(*words, cwd=tmp_path)
    path = wait_for(9, tmp_path, process)
    process.kill()
    process.wait()
    again = call(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert list((tmp_path / "runs").iterdir()) == [path]
    steps = [step for step, name, _ in RunFolder(path).read_metrics() if name == "train/loss"]
    assert steps == list(range(1, 21)) and len(RunFolder(path).starts()) == 2
    assert Path(new_folder("latest", str(tmp_path / "runs"), "x")) == path
    folders = {new_folder("auto", "runs", "x", command) for command in ("a=1,b=2,resume=auto", "b=2,a=1", "a=1,b=3")}
    assert len(folders) == 2, "another command is another run"


def test_run_has_one_writer(small, tmp_path):
    process = start(*small, *QUICK, "trainer.max_steps=3000", "checkpoint.every_n_steps=2", cwd=tmp_path)
    path = wait_for(4, tmp_path, process)
    second = call(f"resume={path}", cwd=tmp_path)
    process.kill()
    process.wait()
    assert second.returncode == 2 and "is being written by another process" in second.stderr
    step = RunFolder(path).newest()[1]
    assert resume(path, max_steps=step + 1).newest()[1] == step + 1, "the lock is released when its process dies"


def test_damaged_newest_checkpoint_falls_back_to_the_previous(small, tmp_path, caplog):
    folder = here([*small, *QUICK, "trainer.max_steps=6", "checkpoint.every_n_steps=2"], tmp_path / "run")
    assert [p.name for p in folder.all_checkpoints()] == ["step_0000004.ckpt", "step_0000006.ckpt"]
    wanted, numbers = torch.load(folder.checkpoint(6), weights_only=True), folder.metrics.read_text()
    with folder.checkpoint(6).open("r+b") as file:
        file.truncate(5000)
    resume(folder.root)
    assert "step_0000006.ckpt is damaged; resuming from an older checkpoint" in caplog.text
    assert_same(torch.load(folder.checkpoint(6), weights_only=True)["state_dict"], wanted["state_dict"])
    assert folder.metrics.read_text() == numbers
    for checkpoint in folder.all_checkpoints():
        checkpoint.write_bytes(b"")
    folder.environment.write_text("[{")
    with pytest.raises(ConfigError, match="has no readable checkpoint"):
        resume(folder.root)
    folder.config.write_text("model: [")
    with pytest.raises(ConfigError, match="is damaged"):
        resume(folder.root)


def test_diverging_run_stops_and_keeps_the_last_finite_weights(small, tmp_path):
    cfg = lab.compose(*small, *QUICK, "trainer.max_steps=20", "checkpoint.every_n_steps=2", "trainer.gradient_clip_norm=0")
    grow(cfg, at=5)
    with pytest.raises(RunError, match=r"gradient of step 5 is not finite \(captions: a photo of a dog; a photo of sks dog\)"):
        run(cfg, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.newest()[1] == 4
    state = torch.load(folder.newest()[0], weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert (folder.export / "pytorch_lora_weights.safetensors").is_file()


def grow(cfg, at: int) -> None:
    """A loss that overflows in one optimiser step: its weight is infinite in float32 there."""
    from dreambooth_lab.dreambooth import DreamBooth

    real = DreamBooth.training_step
    BROKEN["undo"] = real

    def broken(self, batch, index):
        parts = real(self, batch, index)
        return parts | {"loss": parts["loss"] * float("inf")} if self.global_step == at - 1 else parts

    DreamBooth.training_step = broken


BROKEN: dict[str, object] = {}


@pytest.fixture(autouse=True)
def restore_training_step():
    yield
    from dreambooth_lab.dreambooth import DreamBooth

    if BROKEN:
        DreamBooth.training_step = BROKEN.pop("undo")


def test_nonfinite_steps_can_be_skipped(small, tmp_path, caplog):
    cfg = lab.compose(*small, *QUICK, "trainer.max_steps=8", "trainer.skip_nonfinite_steps=1")
    grow(cfg, at=5)
    run(cfg, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert "step 5 is not finite" in caplog.text and "skipped, 1 of at most 1" in caplog.text
    assert folder.newest()[1] == 8
    state = torch.load(folder.newest()[0], weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    steps = {int(s["step"]) for s in state["optimizer_states"][0]["state"].values()}
    assert steps == {7}, "the optimiser did not take the step"


def test_nonfinite_weights_are_never_saved():
    weights = {"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}
    with pytest.raises(RunError, match=r"the weights after step 7 are not finite \(b\)"):
        finite.require_finite(weights, 7)
    finite.require_finite({"a": torch.ones(3)}, 7)


def test_warning_if_no_weight_changes(small, tmp_path, caplog):
    for rate, expected in (("0", True), ("1e-3", False)):
        caplog.clear()
        cfg = lab.compose(*small, *QUICK, "trainer.max_steps=2", f"optimizer.lr={rate}", "optimizer.weight_decay=0")
        run(cfg, tmp_path / rate)
        assert ("no weight has changed in 2 steps" in caplog.text) is expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB; skipped if it can't be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_run_ended_by_a_full_or_read_only_disk_can_resume(small, small_disk, tmp_path):
    words = [*small, *QUICK, "trainer.max_steps=400", "checkpoint.every_n_steps=5", f"runs={small_disk}/runs", "resume=auto"]
    process = start(*words, cwd=tmp_path)
    path = wait_for(7, small_disk, process)
    filler = small_disk / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))
    _, output = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: " in output and "Traceback" not in output, output
    assert f"free disk space or give write access, then resume with: python -m dreambooth_lab resume={path}" in output
    step = RunFolder(path).newest_readable()[1]
    assert step >= 5
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused = call(f"resume={path}", cwd=tmp_path)
    assert refused.returncode in (1, 2) and "Traceback" not in refused.stderr, refused.stderr
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    filler.unlink()
    assert resume(path, max_steps=step + 3).newest_readable()[1] == step + 3


def test_failed_evaluation_does_not_stop_training(small, tmp_path, monkeypatch, caplog):
    from dreambooth_lab.callbacks import image_grids

    real = image_grids.save_grid
    monkeypatch.setattr(image_grids, "save_grid", lambda *args: real(*args) if args[1] == 0 else _fail())
    run(lab.compose(*small, "trainer.max_steps=4"), tmp_path / "run")
    assert "Validation failed at step 3 (no such thing); training continues" in caplog.text
    assert RunFolder(tmp_path / "run").newest()[1] == 4


def _fail() -> None:
    raise OSError("no such thing")


def test_run_killed_before_its_first_checkpoint_restarts_in_its_folder(small, tmp_path):
    held_out = tiny.save_photos(tmp_path / "held", [(80, 80)], seed=7)
    eval_options = [f"eval.path={held_out}", "eval.every_n_steps=2", "eval.timesteps=2"]
    words = [*small, *eval_options, "trainer.max_steps=4", "checkpoint.every_n_steps=3", "resume=auto"]
    path = kill_at(0, words, tmp_path)
    again = call(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    theirs = here([word for word in words if word != "resume=auto"], tmp_path / "whole")
    assert RunFolder(path).metrics.read_text() == theirs.metrics.read_text()


def test_run_killed_after_its_last_checkpoint_exports_on_resume(small, tmp_path):
    """The previous checkpoint's export is older."""
    words = [*small, *QUICK, "trainer.max_steps=4", "checkpoint.every_n_steps=2"]
    folder = here(words, tmp_path / "run")
    file = folder.export / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, file)
    resume(folder.root)
    assert_same(load_file(file), weights)


@pytest.mark.parametrize("fails", [False, True], ids=["finished", "failed"])
def test_run_leaves_no_signal_handler_and_no_model_in_memory(fails, small, tmp_path, monkeypatch):
    """Python's signal module would keep the trainer, and with it every model of a sweep."""
    modules = lambda: sum(isinstance(one, DreamBooth) for one in gc.get_objects())  # noqa: E731
    release()  # of other tests' runs
    before, there = signal.getsignal(signal.SIGTERM), modules()
    if fails:
        monkeypatch.setattr(DreamBooth, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        run(lab.compose(*small, *QUICK), tmp_path / "run")
    release()
    assert signal.getsignal(signal.SIGTERM) is before and modules() <= there
