import html
import pickle
import re
import shutil

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.callbacks.ema import Ema
from dreambooth_lab.config import ConfigError
from dreambooth_lab.run import run

NAME = "<b>&"  # a name that needs escaping


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """A run that also trains the token and a text encoder, and keeps its best step."""
    root = tmp_path_factory.mktemp("lab") / "a"
    words = [
        "adapter.train_token=true",
        'dataset.instance_prompt="a photo of q dog"',
        "adapter.text_encoders=[1]",
        "checkpoint.monitor=train/loss",
        "export.name=x",
    ]
    run(lab.compose(*small, "trainer.max_steps=4", *words, f"name='{NAME}'"), root)
    return lab.load(root)


def weights(module):
    return {name: p.detach().clone() for name, p in module.trainable_parameters().items()}


def test_metrics_are_a_data_frame_by_step(done):
    table = done.metrics
    assert isinstance(table, pd.DataFrame) and table.index.name == "step" and set(table.columns) == set(done.series)
    for name, values in done.series.items():
        assert list(table[name].dropna().items()) == values


def test_module_has_the_requested_weights(done):
    base = torch.load(done.folder.checkpoint(4), weights_only=True)
    best = torch.load(done.folder.best()[0], weights_only=True)
    average = base["callbacks"][Ema.__qualname__]["shadow"]
    requested = {
        ("last", False): base["state_dict"], ("last", True): average, (2, False): None, ("best", False): best["state_dict"],
        (done.folder.checkpoint(4), False): base["state_dict"],
    }  # fmt: skip
    made = {key: weights(done.module(*key)) for key in requested}
    for key, expected in requested.items():
        if expected:
            assert made[key].keys() == expected.keys()
            for name, weight in made[key].items():
                assert torch.equal(weight, expected[name]), (key, name)
    name = next(name for name in average if "lora_B" in name)
    assert not torch.equal(made["last", False][name], made[2, False][name])
    assert not done.module().training


def test_module_of_a_schedule_free_run_matches_its_export(small, tmp_path):
    schedulefree = [word for word in small if not word.startswith("optimizer.lr")]
    run(lab.compose(*schedulefree, "optimizer=schedulefree", "trainer.max_steps=3", "validation.every_n_steps=0",
                    "export.dtype=float32"), tmp_path / "run")  # fmt: skip
    exported, again = (lab.load(tmp_path / "run").pipeline(which).unet.state_dict() for which in (None, 3))
    assert exported.keys() == again.keys() and all(torch.equal(exported[name], again[name]) for name in exported)
    point = torch.load(tmp_path / "run/checkpoints/step_0000003.ckpt", weights_only=True)["state_dict"]
    ours = weights(lab.load(tmp_path / "run").module())
    assert any(not torch.equal(ours[name], point[name]) for name in point), "they differ from the training weights"


def test_checkpoint_pipeline_matches_export_pipeline(done):
    def draw(pipeline):
        generator = torch.Generator().manual_seed(0)
        words = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt", "generator": generator}
        return pipeline("a photo of sks dog", **words).images

    exported, last, first = draw(done.pipeline()), draw(done.pipeline("last")), draw(done.pipeline(2))
    assert_close(last, exported, rtol=0, atol=0)
    assert not torch.equal(first, exported)


def test_missing_and_mismatched_checkpoints_are_named(done, small, tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint is 3, but .* has 2, 4, 'best'"):
        done.module(3)
    with pytest.raises(ConfigError, match="is damaged, or is not a checkpoint"):
        (tmp_path / "x.ckpt").write_bytes(b"nothing")
        done.module(tmp_path / "x.ckpt")
    other = lab.load(done.folder.root)
    other.config.adapter.rank, other.config.adapter.train_token = 4, False
    with pytest.raises(ConfigError, match="does not match this configuration"):
        other.module()
    kept = torch.load(done.folder.checkpoint(4), weights_only=True)
    kept["callbacks"].pop(Ema.__qualname__)
    torch.save(kept, tmp_path / "y.ckpt")
    with pytest.raises(ConfigError, match="holds no average"):
        done.module(tmp_path / "y.ckpt", ema=True)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


def test_untrusted_config_runs_no_code(done, tmp_path):
    kept = torch.load(done.folder.checkpoint(4), weights_only=True)
    torch.save(kept | {"callbacks": Bomb()}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="is damaged, or is not a checkpoint"):
        done.module(tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConfigError):
        done.module(tmp_path / "y.ckpt")
    for group in ("model", "adapter"):
        other = lab.load(done.folder.root)
        other.config[group]._target_ = "subprocess.Popen"
        with pytest.raises(ConfigError, match=f"{group}._target_ is 'subprocess.Popen'"):
            other.module()
    other = lab.load(done.folder.root)
    other.config.optimizer._target_ = "subprocess.Popen"
    other.module()  # which needs no extra
    kept["optimizer_states"][0]["param_groups"][0]["train_mode"] = True
    torch.save(kept, tmp_path / "z.ckpt")
    with pytest.raises(ConfigError, match=r"no torch\.optim\.Optimizer"):
        other.module(tmp_path / "z.ckpt")


def test_run_from_another_machine_loads(done):
    other = lab.load(done.folder.root)
    other.config.trainer.accelerator, other.config.trainer.devices, other.config.adapter.init_from = "gpu", 8, "/gone"
    if not torch.cuda.is_available():
        assert next(iter(other.module().trainable_parameters().values())).device.type == "cpu"
    assert other.config.trainer.devices == 8, "its configuration is unchanged"


def test_notebook_cell_shows_images_and_summary(done):
    shown = done._repr_html_()
    assert shown.count("data:image/jpeg;base64") == 1 and 'class="verdict"' in shown and "keep step" in shown
    assert "step 0 (the base model) and step 4" in shown and not re.search(r"<script|<b>&", shown)
    other = lab.load(done.folder.root)
    other.config.dataset.instance_prompt = other.config.validation.prompts[0] = "<script>alert(1)</script>"
    assert "<script" not in other._repr_html_()


def test_runs_are_listed_and_compared_in_data_frames(done, small, tmp_path):
    assert lab.runs(tmp_path).empty
    shutil.copytree(done.folder.root, tmp_path / "a")
    other = tmp_path / "b"
    run(lab.compose(*small, "trainer.max_steps=4", "seed=1", "validation.every_n_steps=0"), other)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.yaml").write_text("{")
    (tmp_path / "bad" / "environment.json").write_text("[]")
    table = lab.runs(tmp_path)  # a damaged run is skipped
    assert list(table.index) == [str(tmp_path / "a"), str(other)]
    assert list(table["steps"]) == [4, 4] and list(table["seed"]) == [0, 1] and table["name"].iloc[0] == NAME
    assert (table["seconds"] > 0).all() and table["train/loss"].nunique() == 2 and "trainer.max_steps" not in table
    found = lab.compare(done, other)
    assert set(found.runs["seed"]) == {0, 1} and "train/loss" in set(found.differences["metric"])
    shown = found._repr_html_()
    assert 'sandbox="allow-scripts"' in shown and shown.count("<") == 2, "all else is the frame's escaped page"
    page = html.unescape(shown)
    assert "plotly-graph-div" in page and "<h2>What can be concluded</h2>" in page
    with pytest.raises(ConfigError, match="contains no run"):
        lab.compare(tmp_path / "none")
