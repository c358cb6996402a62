"""What lies beside the weights: the card, whose code works, and the way to the hub."""

from __future__ import annotations

import re
from typing import ClassVar

import huggingface_hub
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.callbacks.card import usage
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.run import run

TOKEN = "hf_secret"
PUSH = ["export.push_to_hub=true", "export.repo=me/sks-dog"]
QUICK = ["trainer.max_steps=2", "validation.num_images=1", "ema.enabled=false"]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    learned = ["adapter.train_token=true", "adapter.token=q", 'dataset.instance_prompt="a \'photo\' of q: \\"dog\\""']
    run(
        lab.compose(
            *small, *learned, "trainer.max_steps=2", "webhook=raw", "webhook.receivers.raw.url=http://127.0.0.1:9/secret"
        ),
        folder,
    )
    return lab.load(folder)


def test_the_card_shows_pictures_numbers_and_facts(finished):
    card = (finished.folder.export / "README.md").read_text()
    front = OmegaConf.create(card.split("---")[1])
    assert front.instance_prompt == "a 'photo' of q: \"dog\"" and front.library_name == "diffusers"
    assert "base_model" not in front, "a folder of this machine is no model of the hub's"
    last = dict(finished.metrics["train/loss"])[2]
    assert f"| train/loss | {last:.6g} | 2 |" in card and "lora of rank 4" in card and "2 optimiser steps" in card
    for name in re.findall(r"\]\((.*?)\)", card):
        assert (finished.folder.export / name).stat().st_size > 100
    for file in re.findall(r"^- `(.*)`$", card, re.M):
        assert (finished.folder.export / file).is_file()
    assert "Averaged weights" in (finished.folder.export / "ema" / "README.md").read_text()
    assert usage(finished.folder.export) in finished.folder.report.read_text().replace("&quot;", '"').replace("&#x27;", "'")


def test_addresses_of_webhooks_stay_out_of_what_is_given_away(finished):
    for path in finished.folder.export.rglob("*"):
        assert path.is_dir() or b"127.0.0.1:9" not in path.read_bytes(), path


@pytest.mark.parametrize("words", [[], ["adapter=lokr"], ["adapter=full"]], ids=["lora", "lokr", "full"])
def test_the_code_on_the_card_works(words, finished, small, tmp_path):
    if words:
        run(lab.compose(*small, *QUICK, *words, "adapter.rank=1", "validation.every_n_steps=0"), tmp_path / "run")
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
    """Stands in for the hub's client."""

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


def test_nothing_is_pushed_unless_asked(hub, small, tmp_path):
    run(lab.compose(*small, *QUICK, "validation.every_n_steps=0"), tmp_path / "run")
    assert not hub.calls


def test_the_export_is_pushed_once_at_the_end_and_the_token_is_written_nowhere(hub, small, tmp_path):
    run(lab.compose(*small, *QUICK, *PUSH, "checkpoint.every_n_steps=1"), tmp_path / "run")
    made, sent = hub.calls
    assert made == ("create", "me/sks-dog", True, True) and sent[1] == "me/sks-dog" and sent[3].endswith("2 steps")
    assert {"README.md", "pictures.png", "pytorch_lora_weights.safetensors"} <= sent[2]
    assert 'export = snapshot_download("me/sks-dog")' in (tmp_path / "run" / "export" / "README.md").read_text()
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_hub_that_refuses_costs_the_run_nothing(hub, small, tmp_path, monkeypatch, caplog):
    def refuse(self, *_, **__):
        raise RuntimeError(f"401 for {TOKEN}")

    monkeypatch.setattr(hub, "create_repo", refuse)
    run(lab.compose(*small, *QUICK, *PUSH), tmp_path / "run")
    folder = lab.load(tmp_path / "run").folder
    assert folder.report.is_file() and "not pushed to me/sks-dog: 401 for …" in caplog.text and TOKEN not in caplog.text
    with safe_open(folder.export / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "2"


def test_a_push_that_cant_work_is_refused(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as error:
        check(lab.compose("dataset.path=.", "export.push_to_hub=true", "export.repo=nobody"))
    for said in ("export.repo is 'nobody'; set it to owner/name", "'HF_TOKEN', an environment variable that is not set",
                 "HF_HUB_OFFLINE is set"):  # fmt: skip
        assert said in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    check(lab.compose("dataset.path=.", *PUSH))
