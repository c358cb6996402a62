"""The three-line summary at the end of a run, and runs with max_epochs."""

from __future__ import annotations

import logging
import shlex

import pytest
import torch
from safetensors.torch import save_file

from dreambooth_lab import lab, report
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.report.summary import for_comfyui
from dreambooth_lab.run import run
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.tools import generate


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A run of two epochs on five photos and their class images, with its log messages."""
    root = tmp_path_factory.mktemp("ending") / "run"
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("dreambooth_lab")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    words = [
        "trainer.max_epochs=2",
        "validation.every_n_steps=0",
        "ema.enabled=false",
        "trainer.progress=true",
        "checkpoint.keep=1",
    ]
    try:
        run(lab.compose(*small, *words), root)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return RunFolder(root), messages


def test_max_epochs_sets_the_number_of_steps(finished):
    folder, _ = finished
    cfg = folder.saved_config()
    assert cfg.trainer.max_steps == lab.load(folder.root).steps == 10 and cfg.trainer.max_epochs is None
    assert len(folder.all_checkpoints()) == 1
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs is 0"):
        check(lab.compose("trainer.max_epochs=0"))


def test_summary_has_three_lines_for_result_step_and_usage(finished):
    folder, output = finished
    learned, keep, use = report.summary_lines(folder)
    assert all(line in output for line in (learned, keep, use))
    assert learned.startswith("learned: train/loss ") and "eval.path" in learned
    assert keep.startswith("keep: No step is marked as best")
    command, _, copy = use.removeprefix("use: ").partition("; ")
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", generate.__name__] and generate.read(words[3:]).prompt == ["a photo of sks dog"]
    file = folder.export / copy.split()[3].rpartition("/")[2]
    assert file.is_file() and for_comfyui(folder.export) == file and "ComfyUI/models/loras" in copy


def test_summary_starts_with_change_from_base_and_names_the_kept_step(finished, tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_text(finished[0].config.read_text())
    folder.metrics.write_text("step,name,value\n0,eval/loss,0.5\n5,eval/loss,0.25\n9,eval/loss,0.375\n9,train/loss,1.0\n")
    rows = [f"{step},live,dino,a,{image},{value}" for step, value in ((0, 0.2), (9, 0.7)) for image in range(4)]
    folder.scores.write_text("\n".join(["step,weights,metric,prompt,image,value", *rows, ""]))
    learned, keep, use = report.summary_lines(folder)
    assert learned == "learned: eval/loss 0.5 → 0.375; dino 0.200 → 0.700 (base model → step 9)"
    assert "eval/loss was lowest at step 5" in keep and "<" not in keep and f"the files are in {folder.export}" in use


def test_comfyui_file_is_detected_by_its_keys(tmp_path):
    assert for_comfyui(tmp_path) is None
    save_file({"unet.a.lora_A.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"broken")
    assert for_comfyui(tmp_path) is None
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, tmp_path / "c.safetensors")
    assert for_comfyui(tmp_path) == tmp_path / "c.safetensors"


def test_progress_in_a_log_file_is_plain_lines(finished):
    _, messages = finished
    (line,) = [one for one in messages if one.startswith("step 10 of 10  loss ")]
    assert "steps/s" in line and "━" not in " ".join(messages)
