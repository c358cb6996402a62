"""Whole runs on a tiny SDXL, in process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.factory import build_family
from dreambooth_lab.resuming import resume_config
from dreambooth_lab.run import run
from dreambooth_lab.runfolder import RunFolder


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    run(lab.compose(*small, "adapter.alpha=8"), folder)
    return lab.load(folder)


def test_run_writes_all_files_to_its_folder(done):
    folder = done.folder
    for path in (folder.config, folder.environment, folder.preflight, folder.metrics, folder.report):
        assert path.stat().st_size > 0
    assert sorted(done.images) == [0, 3, 6]
    assert folder.newest() == (folder.checkpoint(6), 6)
    assert sorted(folder.checkpoints.iterdir()) == [folder.checkpoint(4), folder.checkpoint(6)], "the newest two"
    assert [step for step, _ in done.series["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert {"train/loss_instance", "train/loss_prior", "train/lr"} < done.series.keys()


def test_time_and_memory_are_reported_by_phase(done):
    cost = done.folder.starts()[-1]["cost"]
    assert list(cost) == ["photos, text and caches", "adapter and preflight", "training", "images", "saving"]
    assert all(phase["memory_mib"] > 0 for phase in cost.values())


def test_loss_is_the_sum_of_its_logged_terms(done):
    parts = [dict(done.series[f"train/{name}"]) for name in ("loss", "loss_instance", "loss_prior")]
    for step, total in parts[0].items():
        assert total == pytest.approx(parts[1][step] + parts[2][step])


def test_first_images_match_the_base_model_and_training_changes_them(done):
    family = build_family(done.config)
    text, negative = family.encode_text(["a photo of sks dog"]), family.encode_text([""])
    image = family.generate(
        text,
        negative,
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1),
    )[0]
    saved = [Image.open(done.folder.image_folder / f"step_{step:07d}" / "00_01.png") for step in (0, 6)]
    assert saved[0].tobytes() == image.tobytes() != saved[1].tobytes()


def test_checkpoint_holds_trained_weights_and_loads_without_pickles(done):
    checkpoint = torch.load(done.folder.newest()[0], weights_only=True)
    assert checkpoint["state_dict"] and all("lora_" in name for name in checkpoint["state_dict"])


FRESH = """
import sys, torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
pipeline = StableDiffusionXLPipeline.from_pretrained(sys.argv[1], add_watermarker=False)
pipeline.load_lora_weights(sys.argv[2])
assert not any(name.startswith("dreambooth_lab") for name in sys.modules)
x = load_file(sys.argv[3])
y = pipeline.unet(x["x"], x["t"], x["states"], added_cond_kwargs={"text_embeds": x["pooled"], "time_ids": x["size"]}).sample
save_file({"y": y.detach()}, sys.argv[3] + ".out")
"""


@pytest.mark.parametrize("which", ["live", "ema"])
def test_export_predicts_the_same_in_plain_diffusers(done, small, tmp_path, which):
    from safetensors.torch import save_file

    from dreambooth_lab.dreambooth import DreamBooth
    from dreambooth_lab.factory import build_adapter

    checkpoint = torch.load(done.folder.newest()[0], weights_only=True)
    weights = checkpoint["state_dict"] if which == "live" else checkpoint["callbacks"]["Ema"]["shadow"]
    family, adapter = build_family(done.config), build_adapter(done.config)
    adapter.attach(family.denoiser, family.target_modules, seed=9)
    DreamBooth(done.config, family, adapter).load_state_dict(weights, strict=False)
    x, text = torch.randn(1, 4, 8, 8), family.encode_text(["a photo of sks dog"])
    embeddings = {"states": text["prompt_embeds"], "pooled": text["pooled_prompt_embeds"]}
    inputs = {"x": x, "t": torch.tensor([500]), **embeddings, "size": torch.zeros(1, 6)}
    save_file(inputs, tmp_path / "in")
    export = done.folder.export / ("ema" if which == "ema" else "")
    subprocess.run([sys.executable, "-c", FRESH, done.config.model.pretrained, export, tmp_path / "in"], check=True, timeout=300)
    theirs = load_file(tmp_path / "in.out")["y"]
    from dreambooth_lab.batch import Cond

    with torch.no_grad():
        ours = family.denoise(x, family.path.time(inputs["t"]), Cond(text, size=inputs["size"]))
        with adapter.base():
            base = family.denoise(x, family.path.time(inputs["t"]), Cond(text, size=inputs["size"]))
    assert (ours - base).abs().max() > 1e-3, "the adapter changes the prediction"
    assert (ours - theirs).norm() < 0.01 * (ours - base).norm(), "up to float16 rounding"


def test_lab_load_gives_config_metrics_and_a_pipeline(done):
    pipeline = done.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 5.0}
    image = pipeline("a photo of sks dog", generator=torch.Generator().manual_seed(0), **options).images[0]
    saved = Image.open(done.folder.image_folder / "step_0000006" / "00_00.png")
    difference = torch.tensor(list(image.tobytes())) - torch.tensor(list(saved.tobytes()))
    assert difference.abs().max() <= 1, "the export reproduces the validation image"
    assert done.pipeline(ema=True) is not None
    assert done.config.dataset.instance_prompt == "a photo of sks dog" and done.steps == 6


def test_validation_does_not_change_training(done, small, tmp_path):
    run(lab.compose(*small, "adapter.alpha=8", "validation.every_n_steps=0"), tmp_path / "b")
    assert lab.load(tmp_path / "b").series == done.series
    plain, shown = (torch.load(f.newest()[0], weights_only=True)["state_dict"] for f in (RunFolder(tmp_path / "b"), done.folder))
    assert all(torch.equal(plain[name], shown[name]) for name in shown)


def test_accumulation_logs_the_mean_over_micro_batches(small, tmp_path):
    quick = [
        *small,
        "prior=none",
        "optimizer.lr=0",
        "trainer.max_steps=4",
        "validation.every_n_steps=0",
        "ema.enabled=false",
    ]
    run(lab.compose(*quick, "trainer.max_steps=8"), tmp_path / "one")
    run(lab.compose(*quick, "trainer.accumulate_grad_batches=2"), tmp_path / "two")
    one, two = (dict(lab.load(tmp_path / name).series["train/loss"]) for name in ("one", "two"))
    for step, loss in two.items():
        assert loss == pytest.approx((one[2 * step - 1] + one[2 * step]) / 2, rel=1e-5)
    assert len(two) == 4


def test_ema_follows_its_closed_form(small, tmp_path):
    from dreambooth_lab.callbacks.ema import Ema

    live = {"denoiser.w": torch.tensor([0.0, 4.0])}
    ema = Ema(0.9, 2, "cpu")
    ema.shadow = {name: p.clone() for name, p in live.items()}

    class At:
        pass

    from unittest.mock import MagicMock

    from dreambooth_lab.dreambooth import DreamBooth

    module = MagicMock(spec=DreamBooth)
    module.trainable_parameters.return_value = live
    expected = torch.tensor([0.0, 4.0])
    for step in range(1, 31):
        live["denoiser.w"] += 1
        at = At()
        at.global_step = step
        ema.on_train_batch_end(at, module, None, None, 0)
        if step % 2 == 0:
            decay = min(0.9, (1 + step) / (10 + step)) ** 2
            expected = decay * expected + (1 - decay) * live["denoiser.w"]
        assert_close(ema.shadow["denoiser.w"], expected)


def test_ema_of_delayed_weights_matches_immediate_averaging(monkeypatch):
    """As on a CUDA device: copies of a step's weights arrive later and are averaged when next needed."""
    from unittest.mock import MagicMock

    from dreambooth_lab.callbacks.ema import Ema
    from dreambooth_lab.dreambooth import DreamBooth

    module, live = MagicMock(spec=DreamBooth), {"w": torch.tensor([0.0, 4.0])}
    module.trainable_parameters.return_value = live
    at_once, later = Ema(0.9, 1, "cpu"), Ema(0.9, 1, "cpu")
    waited = []

    def send(learning):
        later.staged = {name: p.clone() for name, p in learning.items()}
        return MagicMock(synchronize=lambda: waited.append(1))

    later._send = send
    for ema in (at_once, later):
        ema.shadow = {"w": live["w"].clone()}
    for step in range(1, 9):
        live["w"] += 1
        for ema in (at_once, later):
            ema.on_train_batch_end(MagicMock(global_step=step), module, None, None, 0)
        if step == 4:
            assert_close(later.state_dict()["shadow"]["w"], at_once.state_dict()["shadow"]["w"], rtol=0, atol=0)
    assert_close(later.average()["w"], at_once.average()["w"], rtol=0, atol=0)
    assert len(waited) == 8, "each copy is waited for once"


def test_preflight_only_does_not_train(small, tmp_path):
    run(lab.compose(*small, "preflight=only"), tmp_path / "p")
    folder = RunFolder(tmp_path / "p")
    text = folder.preflight.read_text()
    assert "instance-64px" in text and "trainable parameters" in text and not folder.metrics.exists()


def test_resume_refuses_changes_to_past_steps(done, small):
    again = [*small, f"resume={done.folder.root}"]
    assert resume_config(lab.compose(f"resume={done.folder.root}"), ["trainer.max_steps=9"]).adapter.alpha == 8
    words = ["optimizer.lr=5", "trainer.max_steps=9", "dataset.batch_size=1"]
    with pytest.raises(ConfigError, match=r"optimizer\.lr was 0\.01, now 5\.0") as caught:
        resume_config(lab.compose(*again, *words), words)
    assert "dataset.batch_size was 2, now 1" in str(caught.value) and "max_steps" not in str(caught.value)


def test_resume_requires_a_run(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        resume_config(lab.compose(f"resume={tmp_path}"), [])
