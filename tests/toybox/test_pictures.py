"""The shipped image folders match the generator."""

import numpy as np
import pytest
from PIL import Image

from dreambooth_lab import lab
from dreambooth_lab.tools import draw_toybox
from dreambooth_lab.toybox.world import HELD_OUT_LOOKS, SUBJECTS


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    draw_toybox.write(folder)
    return folder


def test_shipped_images_match_the_generator(drawn):
    names = {path.relative_to(drawn) for path in drawn.rglob("*.png")}
    assert names == {path.relative_to(draw_toybox.SHIPPED) for path in draw_toybox.SHIPPED.rglob("*.png")}
    for name in names:
        ours, shipped = (np.asarray(Image.open(root / name), dtype=float) for root in (drawn, draw_toybox.SHIPPED))
        assert np.abs(ours - shipped).mean() < 1, name  # Pillow's versions may differ at an edge


def test_class_images_never_show_a_subject():
    for who in SUBJECTS.values():
        assert all(shown.scene.who.look not in HELD_OUT_LOOKS for shown in draw_toybox.class_pictures(who.kind, 12))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_each_subject_is_a_dataset(subject):
    cfg = lab.compose("dataset=toybox", f"dataset.subject={subject}")
    assert len(list(draw_toybox.SHIPPED.parent.glob(f"pictures/photos/{subject}/*.png"))) == draw_toybox.PHOTOS
    assert cfg.dataset.path.endswith(subject) and cfg.dataset.instance_prompt == f"a photo of sks {subject}"
