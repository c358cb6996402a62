"""The gallery: whether an image shows the subject or one that looks like it."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import tiny
from dreambooth_lab import lab
from dreambooth_lab.callbacks.retrieval import average_precision, of_photos
from dreambooth_lab.callbacks.scores import read_scores
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.factory import build_family
from dreambooth_lab.run import run
from dreambooth_lab.tools import draw_toybox
from dreambooth_lab.toybox.subjects import look_alikes
from dreambooth_lab.toybox.world import SUBJECTS


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return tiny.save_dino(tmp_path_factory.mktemp("judge") / "dino")


@pytest.fixture
def others(tmp_path):
    """Two individuals, one with two images."""
    tiny.save_photos(tmp_path / "others" / "rex", [(40, 40), (50, 30)], seed=21)
    tiny.save_photos(tmp_path / "others" / "max", [(60, 60)], seed=22)
    return tmp_path / "others"


def vectors(n, seed):
    return normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_hand(query, right, wrong):
    """Walk down the ranked gallery and average the precision at every photo."""
    ranked = sorted([(float(query @ v), 1) for v in right] + [(float(query @ v), 0) for v in wrong], key=lambda x: (-x[0], x[1]))
    found, precisions = 0, []
    for place, (_, is_right) in enumerate(ranked, 1):
        found += is_right
        if is_right:
            precisions.append(found / place)
    return sum(precisions) / len(precisions)


def test_it_is_the_average_precision_by_hand():
    queries, right, wrong = vectors(30, 0), vectors(4, 1), vectors(9, 2)
    expected = [by_hand(query, right, wrong) for query in queries]
    assert average_precision(queries, right, wrong).tolist() == pytest.approx(expected)
    assert len(set(expected)) > 10


def test_a_photo_is_1_a_look_alike_is_small_and_a_collapse_gets_no_credit():
    photo, wrong = vectors(1, 3), vectors(9, 4)
    assert average_precision(photo, photo, wrong).tolist() == [1.0]
    assert average_precision(wrong[:1], photo, wrong[:1].expand(9, -1)).tolist() == pytest.approx([1 / 10])
    several = normalize(photo + 0.1 * vectors(5, 5), dim=-1)
    assert average_precision(photo, several, wrong).tolist() == [1.0]
    behind = [sum(k / (k + 9) for k in range(1, 6)) / 5]
    assert average_precision(wrong[:1], several, wrong[:1].expand(9, -1)).tolist() == pytest.approx(behind)
    assert average_precision(photo, photo.expand(5, -1), photo.expand(9, -1)).tolist() == pytest.approx(behind), "all equal"


def test_chance_is_about_the_share_of_the_photos():
    mean = float(average_precision(vectors(2000, 6), vectors(5, 7), vectors(20, 8)).mean())
    assert 0.2 < mean < 0.35


def test_photos_are_judged_each_among_the_others():
    right, wrong = vectors(4, 9), vectors(7, 10)
    expected = [by_hand(right[i], torch.cat([right[:i], right[i + 1 :]]), wrong) for i in range(4)]
    assert of_photos(right, wrong) == pytest.approx(sum(expected) / 4)
    assert of_photos(right[:1], wrong) is None


def test_a_run_scores_images_of_the_subject_only(small, dino, others, tmp_path):
    prompts = '["a photo of sks dog","a photo of a dog"]'
    words = [f"eval.dino_model={dino}", f"eval.gallery={others}", f"validation.prompts={prompts}"]
    run(lab.compose(*small, *words), tmp_path / "run")
    seen = lab.load(tmp_path / "run")
    for name in ("dino", "dino_masked"):
        own = [score for score in read_scores(seen.folder) if score.metric == f"gallery_{name}"]
        assert {score.prompt for score in own} == {"a photo of sks dog"} and len(own) == 3 * 2
        assert all(0 < score.value <= 1 for score in own)
        last = [score.value for score in own if score.step == 6]
        assert dict(seen.series[f"subject/gallery_{name}"])[6] == pytest.approx(sum(last) / 2)
    assert "gallery_dino" in seen.folder.report.read_text() and "look-alikes" in seen.folder.report.read_text()


def prepared(small, *overrides):
    cfg = lab.compose(*small, *overrides)
    check(cfg)
    data = DreamBoothData(cfg, build_family(cfg))
    data.prepare()
    return data


def test_every_image_of_the_folder_is_read(small, dino, others):
    found = prepared(small, f"eval.dino_model={dino}", f"eval.gallery={others}").gallery
    batches = list(found.batches(2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert [image.size for batch in batches for image in batch] == [(60, 60), (40, 40), (50, 30)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.gallery=./nowhere"], "eval.gallery is './nowhere', which does not exist"),
        (["eval.gallery=.", "eval.dino_model=null"], "whose images DINO compares; set eval.dino_model"),
        (["eval.gallery=.", "validation.every_n_steps=0"], "so there are no images to rank it by"),
        (["eval.gallery=.", 'validation.prompts=["a dog"]'], "no prompt of validation.prompts is about the subject"),
    ],
)
def test_what_cannot_work_is_refused(small, dino, words, said):
    with pytest.raises(ConfigError) as caught:
        check(lab.compose(*small, f"eval.dino_model={dino}", *words))
    assert said in str(caught.value)


def test_a_folder_that_is_no_gallery_is_refused_before_anything_is_cached(small, dino, photos, others):
    def refused():
        with pytest.raises(ConfigError) as caught:
            prepared(small, f"eval.dino_model={dino}", f"eval.gallery={others}")
        return str(caught.value)

    shutil.copy(photos / "02.png", others / "max" / "copy.png")
    (others / "torn.png").write_bytes((photos / "00.png").read_bytes()[:200])
    said = refused()
    assert "max/copy.png is the subject's own photo 02.png; remove it" in said and "torn.png can't be read" in said
    shutil.rmtree(others)
    others.mkdir()
    assert "it has no image" in refused()


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_toyboxs_look_alikes_are_others_that_look_alike(name):
    drawn = look_alikes(name, draw_toybox.LOOK_ALIKES)
    assert len(set(drawn)) == len(drawn) >= 20 and SUBJECTS[name] not in drawn
    for who in drawn:
        changed = [key for key, value in vars(SUBJECTS[name]).items() if getattr(who, key) != value]
        assert who.kind == name and 1 <= len(changed) <= 3
    shipped = sorted((draw_toybox.SHIPPED / "lookalikes" / name).glob("*.png"))
    assert len(shipped) == len(drawn) and Image.open(shipped[0]).size == (128, 128)
