"""What the judge of toy runs measures."""

from types import SimpleNamespace

import numpy as np
import torch
from torch.testing import assert_close

from dreambooth_lab import lab
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.tools.judge_toybox import EDGE, Judge, _edges, leak, log
from dreambooth_lab.toybox.subjects import look_alike_pictures, subject_photos
from dreambooth_lab.toybox.world import SUBJECTS, place, render

CITY = [photo.image for photo in subject_photos("robot", 3, places=("in the city",))]


def beach(n):
    random = np.random.default_rng(0)
    return [render(place(SUBJECTS["cat"], "on the beach", random)).image for _ in range(n)]


def test_leak_is_the_way_from_the_base_to_the_photos():
    before, photos = torch.randn(4, 50), torch.randn(3, 50)
    end = photos.mean(0).expand(4, 50)
    for share in (0.0, 0.25, 1.0):
        assert_close(leak(before.lerp(end, share), before, photos), torch.full((4,), share), atol=1e-5, rtol=0)
    aside = torch.randn(4, 50)
    way = end - before
    aside = aside - way * (aside * way).sum(1, keepdim=True) / way.square().sum(1, keepdim=True)
    assert_close(leak(before + aside, before, photos), torch.zeros(4), atol=1e-5, rtol=0)


def test_edges_show_the_place_and_not_the_subject():
    other = [photo.image for photo in subject_photos("fish", 3, places=("in the city",))]
    apart = lambda a, b: float((_edges(a).mean(0) - _edges(b).mean(0)).abs().mean())  # noqa: E731
    assert _edges(CITY).shape == (3, 3 * 128 * 2 * EDGE)
    assert apart(CITY, other) < 0.5 * apart(CITY, beach(3))


def test_pictures_at_home_and_away_are_told_apart():
    judge = Judge()
    away = judge.score("a photo of sks robot on the beach", beach(3), beach(3), CITY)
    home = judge.score("a photo of sks robot on the beach", CITY, beach(3), CITY)
    assert (away.home, away.leak, away.place) == (0.0, 0.0, 1.0)
    assert (home.home, home.place) == (1.0, 0.0) and 0.8 < home.leak < 1.2 and home.identity > 0.9


def test_gallery_tells_the_subject_from_its_look_alikes():
    """The evaluator's head for individuals has never seen the subject; the queries are photos that it is not compared with."""
    judge, found = Judge(), []
    for subject in SUBJECTS:
        photos = [photo.image for photo in subject_photos(subject, 9)]
        others = [picture.image for picture in look_alike_pictures(subject, 30)[24:]]
        found.append([judge.score("", images, images, photos[:5], subject).gallery for images in (photos[5:], others)])
    own, other = np.array(found).T
    assert own.mean() > 0.9 and other.mean() < 0.5 and (own - other > 0.3).all(), found
    assert judge.score("a photo of sks dog", beach(2), beach(2), CITY, None).gallery is None, "not a subject of the toy world"


def test_logged_means_are_those_of_the_prompts(tmp_path):
    """Subject and class prompts are averaged apart, a repetition replaces earlier lines, and other metrics stay."""
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("step,name,value\n0,train/loss,0.5\n2,clip/mean,0.25\n")
    prompts = ["a photo of sks robot", "a photo of sks robot in space", "a photo of a robot", "a photo of a cat"]
    cfg = lab.compose("dataset=toybox")
    for shift in (5.0, 0.0):
        records = [
            {"step": step, "prompt": prompt, "identity": i + step + shift, "gallery": i / 4}
            for step in (0, 2)
            for i, prompt in enumerate(prompts)
        ]
        log(SimpleNamespace(config=cfg, folder=folder), records)
    assert sorted(folder.read_metrics()) == [
        (0, "class/pres_evaluator", 2.0), (0, "subject/evaluator", 0.5), (0, "subject/gallery_evaluator", 0.125),
        (0, "train/loss", 0.5), (2, "class/pres_evaluator", 4.0), (2, "clip/mean", 0.25), (2, "subject/evaluator", 2.5),
        (2, "subject/gallery_evaluator", 0.125),
    ]  # fmt: skip
