import numpy as np
import pytest

from dreambooth_lab.toybox.captions import caption
from dreambooth_lab.toybox.shapes import CLASSES, SUBJECT_SHADES
from dreambooth_lab.toybox.subjects import UNSEEN_PLACES, subject_photos
from dreambooth_lab.toybox.world import (
    BACKGROUNDS,
    BUCKETS,
    HELD_OUT_LOOKS,
    NAMED,
    SUBJECTS,
    Scene,
    prompts,
    render,
    scene,
)


def pixels(s, size=(128, 128)):
    return np.asarray(render(s, size).image).astype(int)


def test_scene_is_a_function_of_its_seed():
    assert scene(5) == scene(5) and scene(5) != scene(6)
    assert (pixels(scene(5)) == pixels(scene(5))).all()


@pytest.mark.parametrize("size", BUCKETS)
def test_images_have_the_requested_size(size):
    rendered = render(scene(1), size)
    assert rendered.image.size == rendered.mask.size == size[::-1]


@pytest.mark.parametrize("kind", CLASSES)
def test_mask_covers_the_object(kind):
    """Repainting the same individual in another colour changes pixels inside the mask only."""
    who = SUBJECTS[kind]
    a, b = Scene(who, "in the snow", seed=3), Scene(type(who)(**{**vars(who), "colour": "red"}), "in the snow", seed=3)
    mask = np.asarray(render(a).mask)
    changed = (pixels(a) != pixels(b)).any(-1)
    assert changed.sum() > 100 and not changed[mask == 0].any()
    assert 0.1 < (mask > 127).mean() < 0.7


def test_held_out_subjects_are_never_used_for_training():
    for seed in range(4000):
        who = scene(seed).who
        assert who.look not in HELD_OUT_LOOKS
        assert not {who.colour, who.second} & set(SUBJECT_SHADES)


def test_named_individuals_come_from_the_training_distribution():
    assert not {who.look for who in NAMED.values()} & HELD_OUT_LOOKS
    assert any(scene(99 + 100 * i).who in NAMED.values() for i in range(3))


@pytest.mark.parametrize("name", SUBJECTS)
def test_subject_photos_show_one_individual_in_different_places(name):
    photos = subject_photos(name, 5)
    assert {p.scene.who for p in photos} == {SUBJECTS[name]}
    assert len({p.scene.background for p in photos}) == len(BACKGROUNDS) - len(UNSEEN_PLACES)
    assert all(name in p.caption and p.scene.background in p.caption for p in photos)


def test_captions_may_omit_attributes_but_not_the_class():
    captions = [caption(scene(3), np.random.default_rng(i)) for i in range(200)]
    s = scene(3)
    assert all(s.who.kind in c for c in captions)
    assert any(s.who.colour not in c for c in captions) and any(s.background not in c for c in captions)


def test_prompts_enumerate_the_world():
    assert len(prompts()) == len(set(prompts())) == 8 * 6 * 6
