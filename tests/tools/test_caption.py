"""Captions beside photos: by models of the real classes, with the instance prompt in them, nothing overwritten or lost."""

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
def album(tmp_path: Path) -> Path:
    """Two photos, one in a folder."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name, photo in zip(("a.png", "sub/b.png"), subject_photos("robot", 2), strict=True):
        photo.image.save(folder / name)
    return folder


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the network says of the next photos; the last again and again."""
    said = ["a brown dog on a beach"]
    monkeypatch.setattr(captioning, "network", lambda *_: lambda photo: said.pop(0) if len(said) > 1 else said[0])
    return said


def call(album: Path, *words: str):
    return CliRunner().invoke(application, ["--input_dir", str(album), "--model", "any", *words])


@pytest.mark.parametrize("kind", list(KINDS))
def test_caption_matches_the_models_own_generation(kind: str, album: Path, tmp_path: Path) -> None:
    """From a folder, through its own processor; the question is no part of the answer; other pictures, other words."""
    place = str(KINDS[kind](tmp_path / kind))
    captioner = Captioner(place, "--model", torch.device("cpu"), None, 12)
    photos = [Image.open(album / name) for name in ("a.png", "sub/b.png")]
    said = [captioner(photo) for photo in photos]
    assert said == [captioner(photo) for photo in photos] and all("\n" not in text for text in said)
    assert not any(captioner.question in text for text in said)
    whole = [_generate(captioner, photo) for photo in photos]
    texts = captioner.processor.batch_decode([one.sequences[0] for one in whole], skip_special_tokens=True)
    assert all(own and " ".join(text.split()).endswith(own) for text, own in zip(texts, said, strict=True))
    assert not torch.equal(whole[0].scores[0], whole[1].scores[0]), "it looks at the picture"


def _generate(captioner: Captioner, photo: Image.Image):
    """By the model's own call."""
    inputs = captioner._inputs(photo)
    return captioner.model.generate(
        **inputs, max_new_tokens=12, do_sample=False, num_beams=1, return_dict_in_generate=True, output_scores=True
    )


@pytest.mark.parametrize("kind", ["blip", "qwen2_vl"])
def test_folder_is_captioned_by_a_real_model(kind: str, album: Path, tmp_path: Path) -> None:
    model = KINDS[kind](tmp_path / kind)
    done = CliRunner().invoke(application, ["--input-dir", str(album), "--model", str(model), *PROMPTS[:2], "--max_tokens", "8"])
    assert done.exit_code == 0, done.output
    for name in ("a.txt", "sub/b.txt"):
        assert (album / name).read_text().startswith("a photo of sks dog, ")
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


def test_existing_captions_are_kept_and_an_interrupted_call_continues(album: Path, says: list[str]) -> None:
    (album / "a.txt").write_text("mine\n")
    done = call(album, *PROMPTS)
    assert done.exit_code == 0 and "1 captions written, 1 existed already" in done.output
    assert (album / "a.txt").read_text() == "mine\n"
    assert (album / "sub" / "b.txt").read_text() == "a brown sks dog on a beach\n"
    says[:] = ["other"]
    assert "0 captions written, 2 existed already" in call(album).output
    assert call(album, "--force").exit_code == 0 and (album / "a.txt").read_text() == "other\n"


def test_photos_without_a_caption_are_named(album: Path, says: list[str]) -> None:
    says[:] = ["", "a dog"]
    (album / "c.jpg").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(album / "sub" / "b.jpg")
    done = call(album)
    assert done.exit_code == 1
    assert "no caption: a.png: the model returned nothing" in done.output and not (album / "a.txt").exists()
    assert "no caption: c.jpg" in done.output
    assert "no caption: sub/b.png: sub/b.jpg has the same name" in done.output
    (album / "a.txt").write_text(" \n")
    assert "no caption: a.png: a.txt exists but is empty" in call(album).output
    page = (album.parent / "captions_album.html").read_text()
    assert page.count("no caption: ") == 3 and "a dog" in page


def test_invalid_options_are_refused(album: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, named in (
        (["--input_dir", str(tmp_path / "absent"), "--model", "x"], "--input_dir"),
        (["--input_dir", str(album), "--model", str(empty)], "--model"),
        (
            ["--input_dir", str(album), "--model", str(tiny_captioners.blip(tmp_path / "blip")), "--question", "What?"],
            "--question",
        ),
    ):
        failed = CliRunner().invoke(application, words)
        assert isinstance(failed.exception, ConfigError) and named in str(failed.exception)
    assert not list(album.rglob("*.txt"))
