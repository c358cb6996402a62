"""What the judge of toy runs measures."""

import numpy as np
import torch
from torch.testing import assert_close

from dreambooth_lab.tools.judge_toybox import EDGE, Judge, _edges, leak
from dreambooth_lab.toybox.subjects import subject_photos
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
