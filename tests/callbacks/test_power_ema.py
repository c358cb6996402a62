"""Snapshots of power-function averages in a run, and `tools.average`."""

import re

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import dreambooth_lab.run as running
from commands import call
from dreambooth_lab import lab
from dreambooth_lab.callbacks.builders import build_callbacks
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.power_average import gamma_of
from dreambooth_lab.rebuilt import averages
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.tools.averaging import write

WORDS = ["ema.lengths=[0.05,0.1]", "ema.snapshot_every_n_steps=2", "ema.enabled=false", "validation.every_n_steps=0",
         "eval.every_n_steps=100"]  # fmt: skip
TOOL = "dreambooth_lab.tools.average"


class Recorder(Callback):
    """The weights after each step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, *rest):
        self.weights[trainer.global_step] = {n: p.detach().clone() for n, p in pl_module.trainable_parameters().items()}


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """A run of seven steps with its weights at each step."""
    root, held_back = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("held_back")
    for number in range(3):
        Image.new("RGB", (64, 64), (80 * number, 40, 200)).save(held_back / f"{number}.png")
    recorder = Recorder()

    def build(*arguments):
        built = build_callbacks(*arguments)
        built.callbacks.insert(0, recorder)
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "build_callbacks", build)
        running.run(lab.compose(*small, *WORDS, "trainer.max_steps=7", f"eval.path={held_back}"), root)
    return lab.load(root), recorder.weights


def test_snapshots_are_averages_of_the_weights_so_far(done):
    run, weights = done
    assert sorted(run.folder.snapshots()) == [(step, length) for step in (2, 4, 6, 7) for length in (0.05, 0.1)]
    for (step, length), path in run.folder.snapshots().items():
        ends = [(t / step) ** (gamma_of(length) + 1) for t in range(step + 1)]
        for name, found in load_file(path).items():
            exact = sum((ends[t] - ends[t - 1]) * weights[t][name] for t in range(1, step + 1))
            assert found.dtype is torch.float16
            assert_close(found.float(), exact, rtol=1e-3, atol=1e-6)


def test_kept_lengths_are_computed_exactly(done):
    run, _ = done
    end, found = averages(run.folder, [0.05, 0.1])
    assert end == 7
    for length, own in zip((0.05, 0.1), found, strict=True):
        for name, exact in load_file(run.folder.snapshot(7, length)).items():
            assert_close(own[name], exact.float(), rtol=1e-3, atol=1e-5)


def test_resumed_run_writes_the_same_snapshots(done, small, tmp_path):
    running.run(lab.compose(*small, *WORDS, "trainer.max_steps=7", "checkpoint.keep=null"), tmp_path / "cut")
    for path in [*RunFolder(tmp_path / "cut").all_checkpoints()[1:], *(tmp_path / "cut" / "averages").glob("step_000000[4-7]*")]:
        path.unlink()
    call(f"resume={tmp_path / 'cut'}", cwd=tmp_path)
    for key, path in done[0].folder.snapshots().items():
        assert RunFolder(tmp_path / "cut").snapshots()[key].read_bytes() == path.read_bytes()


def test_tool_exports_each_length_and_compares_them(done):
    run, _ = done
    rows = write(run, [0.05, 0.2], None, run.folder.root)
    assert [row.name for row in rows] == ["live, last step", "average_0.05", "average_0.2"]
    assert rows[0].change == 0 and all(row.change == pytest.approx(row.loss - rows[0].loss, abs=1e-6) for row in rows[1:])
    assert rows[1].change != rows[2].change
    short, long = (
        load_file(run.folder.root / name / "pytorch_lora_weights.safetensors") for name in ("average_0.05", "average_0.2")
    )
    assert short.keys() == long.keys() and any(not torch.equal(short[name], long[name]) for name in short)
    assert "average of length 0.2" in (run.folder.root / "average_0.2" / "README.md").read_text()


@pytest.mark.parametrize(
    ("lengths", "step", "why"),
    [
        ([0.001], None, "length is 0.001, which these snapshots are too long"),
        ([0.3], None, "length is 0.3; it must be above 0 and at most 0.28"),
        ([0.1], 3, r"no snapshots of averages of step 3; it has .*2, 4"),
    ],
)
def test_what_cannot_be_averaged_is_refused(done, lengths, step, why):
    with pytest.raises(ConfigError, match=why):
        averages(done[0].folder, lengths, step)


def test_run_without_snapshots_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=re.escape("train with ema.lengths=[0.05,0.1]")):
        averages(RunFolder(tmp_path), [0.1])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["ema.lengths=[0.1]"], "at least two different ones"),
        (["ema.lengths=[0.1,0.1]"], "at least two different ones"),
        (["ema.lengths=[0.1,0.5]"], r"ema.lengths.*0.28"),
        (["ema.lengths=[0.05,0.1]", "optimizer=schedulefree", "ema.enabled=false"], "averages by itself"),
    ],
)
def test_unusable_lengths_are_refused(small, words, why):
    with pytest.raises(ConfigError, match=why):
        check(lab.compose(*small, *words))
