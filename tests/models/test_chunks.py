"""Captions beyond 77 tokens: truncated with a notice, or encoded in chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
import tiny_families
from dreambooth_lab import lab
from dreambooth_lab.batch import ImageInfo, Size
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.factory import build_family
from dreambooth_lab.models.chunks import pieces, tokens
from dreambooth_lab.run import run
from dreambooth_lab.trained import TrainedPipeline

SHORT = "a photo of sks dog"


@pytest.fixture
def family(tiny_sdxl, tmp_path):
    words = ["model=sdxl", f"model.pretrained={tiny_sdxl}", "model.dtype=float32", "dataset=folder", "dataset.path=."]
    return build_family(lab.compose(*words, "trainer.accelerator=cpu", f"cache={tmp_path}"))


def tokenizer(family):
    return family._tokenizer("text_encoder")


def long(family, tail: str) -> str:
    """A caption whose tail lies in its second chunk."""
    text = "a dog"
    while len(tokens(tokenizer(family), text)) < 80:
        text += " a dog"
    return f"{text} {tail}"


def test_short_caption_is_bit_identical(family):
    before, identity = family.encode_text([SHORT, ""]), family.text_identity()
    family.fit_chunks([SHORT, ""])
    after = family.encode_text([SHORT, ""])
    assert family.chunks == 1 and family.text_identity() == identity
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_only_chunked_captions_use_the_tail_and_rows_have_equal_length(family):
    one, other = long(family, "cat"), long(family, "robot")
    cut = family.encode_text([one, other, SHORT, ""])
    assert torch.equal(cut["prompt_embeds"][0], cut["prompt_embeds"][1])
    identity = family.text_identity()
    family.fit_chunks([SHORT, one])
    whole = family.encode_text([one, other, SHORT, ""])
    width = tokenizer(family).model_max_length
    assert family.chunks == 2 and whole["prompt_embeds"].shape[:2] == (4, 2 * width) and family.text_identity() != identity
    assert not torch.equal(whole["prompt_embeds"][0], whole["prompt_embeds"][1])
    assert torch.equal(whole["prompt_embeds"][:, :width], cut["prompt_embeds"]), "the first chunk is unchanged"
    assert torch.equal(whole["pooled_prompt_embeds"], cut["pooled_prompt_embeds"])
    assert family.truncated_part([one]) == []


def test_chunk_matches_encoding_its_words_alone(family):
    text = long(family, "cat on the beach")
    ids = tokens(tokenizer(family), text)
    assert pieces([tokenizer(family)], [text]) == 2
    rest = tokenizer(family).decode(ids[75:])
    assert tokens(tokenizer(family), rest) == ids[75:], "the tail is encoded alone"
    alone = family.encode_text([rest])["prompt_embeds"]
    family.fit_chunks([text])
    torch.testing.assert_close(family.encode_text([text])["prompt_embeds"][:, 77:], alone)


def test_denoiser_accepts_chunked_captions(family):
    family.fit_chunks([long(family, "cat")])
    shown = [ImageInfo(Size((64, 64), (0, 0), (64, 64)), torch.zeros(4, 8, 8), 0, 0, 7.0)]
    cond = family.cond(family.encode_text([long(family, "cat")]), shown)
    assert family.denoise(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), cond).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_families_without_chunking_refuse_it_with_the_reason(name, tmp_path):
    words = [f"model={name}", f"model.pretrained={tiny_families.save(name, tmp_path / name)}", "model.dtype=float32",
             "dataset=folder", "dataset.path=.", "trainer.accelerator=cpu"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"dataset\.long_captions is chunk, but a .*Pipeline takes texts of one length"):
        build_family(lab.compose(*words)).fit_chunks([])


@pytest.mark.slow
def test_run_reads_long_captions_in_full_and_reports_truncation(small, tmp_path, tiny_sdxl):
    photos = tiny.save_photos(tmp_path / "photos", [(80, 80)] * 2)
    for name in ("00", "01"):
        (photos / f"{name}.txt").write_text("a photo of a dog " * (40 if name == "00" else 1))
    words = [*small, f"dataset.path={photos}", "dataset.caption=textfile", f"cache={tmp_path / 'cache'}", "trainer.max_steps=1",
             "validation.every_n_steps=1", "validation.num_images=1"]  # fmt: skip
    for _ in range(2):  # the second time from the cache
        cfg = lab.compose(*words)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        assert sum("captions are longer than the 77 tokens that text_encoder" in notice for notice in data.notices) == 2
    run(lab.compose(*words, "dataset.long_captions=chunk"), tmp_path / "run")
    preflight = lab.load(tmp_path / "run").folder.preflight.read_text()
    assert "are longer than" not in preflight
    tail = [long(build_family(lab.compose(*words)), tail) for tail in ("cat", "robot")]
    trained = TrainedPipeline(lab.load(tmp_path / "run").config, tmp_path / "run" / "export")
    short = trained.draw(SHORT, "", 64, 2, 3.0, 0)[0]
    whole, other = (np.asarray(trained.draw(prompt, "", 64, 2, 3.0, 0)[0]) for prompt in tail)
    assert (whole != other).any(), "sampling uses the tail of a prompt"
    cfg = lab.load(tmp_path / "run").config
    cfg.dataset.long_captions = enums.LongCaptions.truncate
    again = TrainedPipeline(cfg, tmp_path / "run" / "export").draw(SHORT, "", 64, 2, 3.0, 0)[0]
    assert np.abs(np.asarray(short).astype(int) - np.asarray(again).astype(int)).max() <= 2
