"""The files beside the weights: the model card, its code, and the upload to the hub."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.callbacks.card import usage
from dreambooth_lab.callbacks.header import place
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.run import run
from dreambooth_lab.tools.generate import config_from_header
from dreambooth_lab.trained import TrainedPipeline
from programs import a1111_version, forge_version

TOKEN = "hf_secret"
PUSH = ["export.push_to_hub=true", "export.repo=me/sks-dog"]
SORTING = {
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "ss_output_name", "ss_base_model_version",
    "ss_v2",
}  # fmt: skip
QUICK = ["trainer.max_steps=2", "validation.num_images=1", "ema.enabled=false"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    learned = [
        "export.metadata=full",
        "adapter.train_token=true",
        "adapter.token=q",
        'dataset.instance_prompt="a \'photo\' of q: \\"dog\\""',
    ]
    run(
        lab.compose(
            *small, *learned, "trainer.max_steps=2", "webhook=raw", "webhook.receivers.raw.url=http://127.0.0.1:9/secret"
        ),
        folder,
    )
    return lab.load(folder)


def test_card_shows_images_metrics_and_settings(finished):
    card = (finished.folder.export / "README.md").read_text()
    front = OmegaConf.create(card.split("---")[1])
    assert front.instance_prompt == "a 'photo' of q: \"dog\"" and front.library_name == "diffusers"
    assert "base_model" not in front, "a local folder is not a hub model"
    last = dict(finished.series["train/loss"])[2]
    assert f"| train/loss | {last:.6g} | 2 |" in card and "lora of rank 4" in card and "2 optimiser steps" in card
    for name in re.findall(r"\]\((.*?)\)", card):
        assert (finished.folder.export / name).stat().st_size > 100
    for folder in (finished.folder.export, finished.folder.export / "ema"):
        listed = re.findall(r"^\| `(.*?)/?` \|", (folder / "README.md").read_text(), re.M)
        assert all((folder / name).exists() for name in listed)
        for file in (path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
            assert any(file.as_posix() == name or Path(name) in file.parents for name in listed), f"{file} is not on the page"
    assert "Averaged weights" in (finished.folder.export / "ema" / "README.md").read_text()
    assert usage(finished.folder.export) in finished.folder.report.read_text().replace("&quot;", '"').replace("&#x27;", "'")


def test_webhook_urls_are_not_exported(finished):
    for path in finished.folder.export.rglob("*"):
        assert path.is_dir() or b"127.0.0.1:9" not in path.read_bytes(), path


@pytest.mark.parametrize("words", [[], ["adapter=lokr"], ["adapter=full"]], ids=["lora", "lokr", "full"])
def test_card_code_runs(words, finished, small, tmp_path):
    if words:
        run(
            lab.compose(*small, *QUICK, *words, "export.metadata=full", "adapter.rank=1", "validation.every_n_steps=0"),
            tmp_path / "run",
        )
    done = lab.load(tmp_path / "run") if words else finished
    names: dict[str, object] = {}
    exec(usage(done.folder.export).rpartition("pipeline(")[0], names)
    ours, theirs = done.pipeline(), names["pipeline"]
    text = ours.encode_prompt("a photo of q dog", do_classifier_free_guidance=False)
    again = theirs.encode_prompt("a photo of q dog", do_classifier_free_guidance=False)
    assert_close(again[0], text[0])
    added = {"text_embeds": text[2], "time_ids": torch.full((1, 6), 64.0)}
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        a, b = (p.unet(x, torch.tensor([500]), text[0], added_cond_kwargs=added).sample for p in (ours, theirs))
    assert_close(a, b)


class Hub:
    """A fake of the hub's client."""

    calls: ClassVar[list[tuple]] = []

    def __init__(self, token):
        assert token == TOKEN

    def create_repo(self, repo, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, {p.name for p in folder_path.iterdir()}, commit_message))
        return huggingface_hub.CommitInfo(f"https://hf.co/{repo_id}/commit/1", commit_message, "", "1")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


def test_nothing_is_pushed_by_default(hub, small, tmp_path):
    run(lab.compose(*small, *QUICK, "validation.every_n_steps=0"), tmp_path / "run")
    assert not hub.calls


def test_export_is_pushed_once_at_the_end_without_storing_the_token(hub, small, tmp_path):
    run(lab.compose(*small, *QUICK, *PUSH, "checkpoint.every_n_steps=1"), tmp_path / "run")
    made, sent = hub.calls
    assert made == ("create", "me/sks-dog", True, True) and sent[1] == "me/sks-dog" and sent[3].endswith("2 steps")
    assert {"README.md", "images.png", "pytorch_lora_weights.safetensors"} <= sent[2]
    assert 'export = snapshot_download("me/sks-dog")' in (tmp_path / "run" / "export" / "README.md").read_text()
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_failed_push_does_not_fail_the_run(hub, small, tmp_path, monkeypatch, caplog):
    def refuse(self, *_, **__):
        raise RuntimeError(f"401 for {TOKEN}")

    monkeypatch.setattr(hub, "create_repo", refuse)
    run(lab.compose(*small, *QUICK, *PUSH), tmp_path / "run")
    folder = lab.load(tmp_path / "run").folder
    assert folder.report.is_file() and "could not push to me/sks-dog: 401 for …" in caplog.text and TOKEN not in caplog.text
    with safe_open(folder.export / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "2"


def test_invalid_push_settings_are_refused(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as error:
        check(lab.compose("dataset.path=.", "dataset.instance_prompt=a dog", "export.push_to_hub=true", "export.repo=nobody"))
    for message in ("export.repo is 'nobody'; set it to owner/name", "'HF_TOKEN', an environment variable that is not set",
                 "HF_HUB_OFFLINE is set"):  # fmt: skip
        assert message in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    check(lab.compose("dataset.path=.", "dataset.instance_prompt=a dog", *PUSH))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export.name=a/b"], r"export\.name is 'a/b', which is not a plain file name"),
        (["export.formats=[comfyui]"], r"export\.formats is \['comfyui'\]; add diffusers"),
        (["adapter=lokr", "export.formats=[peft]"], r"export\.formats is \['peft'\]; add comfyui or lycoris"),
    ],
)
def test_invalid_export_settings_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        check(lab.compose("dataset.path=.", *words))


@pytest.mark.parametrize("words", [[], ["adapter=lokr"], ["adapter=full"]], ids=["lora", "lokr", "full"])
def test_exported_files_contain_no_local_paths(words, small, tiny_sdxl, tmp_path):
    more = ["adapter.rank=1", "validation.every_n_steps=0", f"runs={tmp_path}/janes-runs"]
    before = os.umask(0o022)
    try:
        run(lab.compose(*small, *QUICK, *words, *more), tmp_path / "run")
    finally:
        os.umask(before)
    export = lab.load(tmp_path / "run").folder.export
    for path in (p for p in export.rglob("*") if p.is_file()):
        assert path.stat().st_mode & 0o777 == 0o644, path
        for secret in (str(tiny_sdxl.parent), str(tmp_path), str(Path.home()) + "/"):
            assert secret.encode() not in path.read_bytes(), (path, secret)
    file = next(p for p in export.rglob("*.safetensors") if "peft" not in str(p))
    with safe_open(file, "pt") as opened:
        header = OmegaConf.create(opened.metadata()["config"])
    assert header.model.pretrained == f"local:{tiny_sdxl.name}" and header.optimizer.lr == 1e-2 and "webhook" not in header
    with pytest.raises(ConfigError, match=r"a local folder or file of its author; set model=BASE"):
        config_from_header(file, None)
    assert config_from_header(file, str(tiny_sdxl)).model.pretrained == str(tiny_sdxl)


def test_metadata_none_writes_no_metadata(small, tmp_path):
    run(lab.compose(*small, *QUICK, "validation.every_n_steps=0", "export.metadata=none"), tmp_path / "run")
    export = lab.load(tmp_path / "run").folder.export
    with safe_open(export / "dreambooth.safetensors", "pt") as opened:
        assert opened.metadata().keys() <= {"format", *SORTING, *(f"ss_network_{key}" for key in ("module", "dim", "alpha"))}
    with safe_open(export / "pytorch_lora_weights.safetensors", "pt") as opened:
        assert opened.metadata().keys() == {"format", "lora_adapter_metadata", *SORTING}


def test_header_has_the_fields_that_other_programs_show(finished):
    """The rules by which A1111 and Forge list files, and the fields that A1111, Forge, ComfyUI and InvokeAI show."""
    export = finished.folder.export
    for folder, name in ((export, "dreambooth"), (export / "ema", "dreambooth_ema")):
        with safe_open(folder / f"{name}.safetensors", "pt") as opened:
            header = opened.metadata()
        assert a1111_version(header) == forge_version(header) == "SDXL"
        assert header["ss_output_name"] == header["modelspec.title"] == name
        assert (header["ss_network_module"], header["ss_network_dim"], header["ss_network_alpha"]) == ("networks.lora", "4", "4")
        assert json.loads(header["ss_tag_frequency"]).popitem()[1] == {"a 'photo' of q: \"dog\"": 5}
        assert (
            header["modelspec.trigger_phrase"] == "a 'photo' of q: \"dog\"" and header["modelspec.prediction_type"] == "epsilon"
        )
        assert header["modelspec.resolution"] == "64x64" and datetime.fromisoformat(header["modelspec.date"]).tzinfo
        kind, _, data = header["modelspec.thumbnail"].partition(",")
        thumbnail = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/jpeg;base64" and max(thumbnail.size) <= 256
        shown = Image.open(next(finished.folder.image_folder.glob("step_0000002/00_00.png"))).convert("L")
        assert (
            thumbnail.size == shown.size
            and np.abs(np.asarray(thumbnail.convert("L"), float) - np.asarray(shown, float)).mean() < 12
        )
    with safe_open(export / "embeddings" / "q.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"


def test_embedding_file_is_readable_by_each_program(finished):
    """A1111 and ComfyUI use the file's name as the trigger word; diffusers needs a token that its tokenizer lacks."""
    file = finished.folder.export / "embeddings" / "q.safetensors"
    rows = load_file(file)
    pipeline = finished.pipeline()
    widths = {"clip_l": pipeline.text_encoder.config.hidden_size, "clip_g": pipeline.text_encoder_2.config.hidden_size}
    assert {key: tuple(row.shape) for key, row in rows.items()} == {key: (1, width) for key, width in widths.items()}
    pipeline.load_textual_inversion(rows["clip_l"], token="<q>", text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer)
    word, (own,) = pipeline.tokenizer.convert_tokens_to_ids("<q>"), pipeline.tokenizer("q", add_special_tokens=False).input_ids
    weight = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(weight[word], weight[own]) and torch.equal(weight[word], rows["clip_l"][0])


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("/home/jane/photos/dog", "dataset.path", "dog"),
        ("~/sdxl/", "model.pretrained", "local:sdxl"),
        (str(Path.home()), "dataset.path", "home"),
        ("C:\\Users\\jane\\dog", "dataset.path", "dog"),
        ("file:///home/jane/dog", "dataset.path", "dog"),
        ("https://jane:secret@host/photos?token=1", "dataset.path", "https://host/photos"),
        ("owner/name", "model.pretrained", "owner/name"),
        ("a photo of sks dog/cat", "dataset.instance_prompt", "a photo of sks dog/cat"),
    ],
)
def test_only_paths_are_cut_to_their_last_component(text, key, expected):
    assert place(text, key) == expected


def test_public_lycoris_preset_is_read_with_the_file_beside_it(small, tiny_sdxl, tmp_path):
    preset = tmp_path / "mine.json"
    preset.write_text(json.dumps({"algo": "lokr", "linear_dim": 4, "linear_alpha": 1, "factor": 4}))
    words = [*small, *QUICK, "adapter=lokr", f"adapter.preset={preset}", "validation.every_n_steps=0"]
    run(lab.compose(*words), tmp_path / "run")
    export = lab.load(tmp_path / "run").folder.export
    preset.unlink()
    for file in (export, export / "dreambooth.safetensors"):
        cfg = config_from_header(file, str(tiny_sdxl))
        assert cfg.adapter.preset == str(export / "lycoris_config.json")
        TrainedPipeline(cfg, file)
