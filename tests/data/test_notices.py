"""The preflight's notices about crops, upscaling and duplicates."""

from __future__ import annotations

import shutil

import pytest

import tiny
from dreambooth_lab.config import enums
from dreambooth_lab.data.preparation import notices
from dreambooth_lab.data.preparation.entry import Collector
from dreambooth_lab.data.spec import Captions, DatasetSpec, Shaping, Where


def entries(tmp_path, folder, shaping):
    spec = DatasetSpec(
        "p", Where(enums.DatasetType.folder, str(folder)), Captions(enums.CaptionKind.instanceprompt, ("a dog",)), shaping
    )
    return Collector(16, tmp_path / "cache").collect([spec]).entries


def test_cropped_share_is_relative_to_the_image_area(tmp_path):
    folder = tiny.save_photos(tmp_path / "photos", [(64, 64), (64, 128), (64, 640)])
    lost = notices.cropping(entries(tmp_path, folder, Shaping(64, aspect=enums.CropAspect.square)))
    assert lost.worst == pytest.approx(0.9) and lost.mean == pytest.approx((0 + 0.5 + 0.9) / 3)
    assert [name for name, _ in lost.much] == ["02.png", "01.png"] and lost.much[1][1] == pytest.approx(0.5)


def test_small_images_and_duplicates_are_reported_by_name(tmp_path):
    folder = tiny.save_photos(tmp_path / "photos", [(64, 64), (1, 1), (40, 40)])
    shutil.copy(folder / "00.png", folder / "copy.png")
    grown, copies = notices.notices(entries(tmp_path, folder, Shaping(128, aspect=enums.CropAspect.square)))[-2:]
    messages = notices.notices(entries(tmp_path, folder, Shaping(64)))
    assert messages[0] == "p: 01.png: 1×1 px is enlarged 64 times, to 64×64" and len(messages) == 2
    assert copies == "p: 00.png, copy.png are the same image (equal bytes), which is used 2 times as often"
    assert grown == "p: 02.png: 40×40 px is enlarged 3.2 times, to 128×128"
