"""Captions beside photos by models of the real classes, with the instance prompt; nothing is overwritten or lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny_captioners
from dreambooth_lab.config import ConfigError
from dreambooth_lab.models.caption import Captioner
from dreambooth_lab.tools import captioning
from dreambooth_lab.tools.caption import application, placing
from dreambooth_lab.toybox.subjects import subject_photos

KINDS = {"blip": tiny_captioners.blip, "florence2": tiny_captioners.florence2, "qwen2_vl": tiny_captioners.qwen2_vl,
         "qwen2_5_vl": tiny_captioners.qwen2_5_vl}  # fmt: skip
PROMPTS = ["--instance_prompt", "a photo of sks dog", "--class-prompt", "a photo of a dog"]


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """Two photos, one in a folder."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name, photo in zip(("a.png", "sub/b.png"), subject_photos("robot", 2), strict=True):
        photo.image.save(folder / name)
    return folder


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The generated captions of the next photos; the last is repeated."""
    captions = ["a brown dog on a beach"]
    monkeypatch.setattr(captioning, "network", lambda *_: lambda photo: captions.pop(0) if len(captions) > 1 else captions[0])
    return captions


def call(photo_folder: Path, *words: str):
    return CliRunner().invoke(application, ["--input_dir", str(photo_folder), "--model", "any", *words])


@pytest.mark.parametrize("kind", list(KINDS))
def test_caption_matches_the_models_own_generation(kind: str, photo_folder: Path, tmp_path: Path) -> None:
    """From a folder with its own processor. The question is not part of the caption, and other images give other captions."""
    place = str(KINDS[kind](tmp_path / kind))
    captioner = Captioner(place, "--model", torch.device("cpu"), None, 12)
    photos = [Image.open(photo_folder / name) for name in ("a.png", "sub/b.png")]
    captions = [captioner(photo) for photo in photos]
    assert captions == [captioner(photo) for photo in photos] and all("\n" not in text for text in captions)
    assert not any(captioner.question in text for text in captions)
    whole = [_generate(captioner, photo) for photo in photos]
    texts = captioner.processor.batch_decode([one.sequences[0] for one in whole], skip_special_tokens=True)
    assert all(own and " ".join(text.split()).endswith(own) for text, own in zip(texts, captions, strict=True))
    assert not torch.equal(whole[0].scores[0], whole[1].scores[0]), "the caption depends on the image"


def _generate(captioner: Captioner, photo: Image.Image):
    """By the model's own generate."""
    inputs = captioner._inputs(photo)
    return captioner.model.generate(
        **inputs, max_new_tokens=12, do_sample=False, num_beams=1, return_dict_in_generate=True, output_scores=True
    )


@pytest.mark.parametrize("kind", ["blip", "qwen2_vl"])
def test_folder_is_captioned_by_a_real_model(kind: str, photo_folder: Path, tmp_path: Path) -> None:
    model = KINDS[kind](tmp_path / kind)
    done = CliRunner().invoke(
        application, ["--input-dir", str(photo_folder), "--model", str(model), *PROMPTS[:2], "--max_tokens", "8"]
    )
    assert done.exit_code == 0, done.output
    for name in ("a.txt", "sub/b.txt"):
        assert (photo_folder / name).read_text().startswith("a photo of sks dog, ")
    assert (tmp_path / "captions_album.html").read_text().count("data:image/jpeg") == 2


def test_instance_prompt_is_placed_as_configured() -> None:
    put = placing("a photo of sks dog", "a photo of a dog")
    assert put("a dog on a beach") == "sks dog on a beach"
    assert put("A brown dog and another dog") == "A brown sks dog and another dog"
    assert put("the Dog sleeps") == "sks dog sleeps"
    assert put("dogma and hotdogs") == "a photo of sks dog, dogma and hotdogs", "whole words only"
    assert placing("a photo of sks dog", None)("a dog") == "a photo of sks dog, a dog"
    assert placing(None, None)("a dog") == "a dog"
    for instance, kind in ((None, "a dog"), ("a photo of a dog", "a photo of a dog"), ("a photo of sks", "a photo of")):
        with pytest.raises(ConfigError, match="--class_prompt"):
            placing(instance, kind)


def test_existing_captions_are_kept_and_an_interrupted_call_continues(photo_folder: Path, generated: list[str]) -> None:
    (photo_folder / "a.txt").write_text("mine\n")
    done = call(photo_folder, *PROMPTS)
    assert done.exit_code == 0 and "1 captions written, 1 existed already" in done.output
    assert (photo_folder / "a.txt").read_text() == "mine\n"
    assert (photo_folder / "sub" / "b.txt").read_text() == "a brown sks dog on a beach\n"
    generated[:] = ["other"]
    assert "0 captions written, 2 existed already" in call(photo_folder).output
    assert call(photo_folder, "--force").exit_code == 0 and (photo_folder / "a.txt").read_text() == "other\n"


def test_photos_without_a_caption_are_named(photo_folder: Path, generated: list[str]) -> None:
    generated[:] = ["", "a dog"]
    (photo_folder / "c.jpg").write_bytes(b"not an image")
    Image.new("RGB", (40, 40)).save(photo_folder / "sub" / "b.jpg")
    done = call(photo_folder)
    assert done.exit_code == 1
    assert "no caption: a.png: the model returned nothing" in done.output and not (photo_folder / "a.txt").exists()
    assert "no caption: c.jpg" in done.output
    assert "no caption: sub/b.png: sub/b.jpg has the same name" in done.output
    (photo_folder / "a.txt").write_text(" \n")
    assert "no caption: a.png: a.txt exists but is empty" in call(photo_folder).output
    page = (photo_folder.parent / "captions_album.html").read_text()
    assert page.count("no caption: ") == 3 and "a dog" in page


def test_invalid_options_are_refused(photo_folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, named in (
        (["--input_dir", str(tmp_path / "absent"), "--model", "x"], "--input_dir"),
        (["--input_dir", str(photo_folder), "--model", str(empty)], "--model"),
        (
            ["--input_dir", str(photo_folder), "--model", str(tiny_captioners.blip(tmp_path / "blip")), "--question", "What?"],
            "--question",
        ),
    ):
        failed = CliRunner().invoke(application, words)
        assert isinstance(failed.exception, ConfigError) and named in str(failed.exception)
    assert not list(photo_folder.rglob("*.txt"))
