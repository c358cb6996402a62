"""Which files of a folder are recognised as photos, and which are skipped with a notice."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image, features

import tiny
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.data.caching.fill import _decode
from dreambooth_lab.data.preparation.entry import Collector
from dreambooth_lab.data.sources import formats
from dreambooth_lab.data.sources.folder import Folder, Remote
from dreambooth_lab.data.sources.table import Table
from dreambooth_lab.data.spec import Captions, DatasetSpec, Masks, Shaping, Where


def saved(kind: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(data, kind)
    return data.getvalue()


def spec(folder: Path, name: str = "photos", **changes) -> DatasetSpec:
    where = Where(enums.DatasetType.folder, str(folder))
    return DatasetSpec(name, where, Captions(enums.CaptionKind.instanceprompt, ("a dog",)), Shaping(64))._replace(**changes)


FILES = [
    ("a.jfif", "JPEG"), ("a.jpe", "JPEG"), ("a.mpo", "JPEG"), ("a", "JPEG"), ("b", "PNG"), ("c", "WEBP"), ("d", "TIFF"),
    ("e.jpg_large", "JPEG"), ("f.webp", "WEBP"), ("two.dots", "PNG"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_image_is_recognised_by_name_or_content(tmp_path, name, kind):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes(saved(kind))
    for source in (Folder(str(tmp_path / "photos")), Remote(f"file://{tmp_path}/photos")):
        assert [(item.name, item.problem) for item in source.items()] == [(name, None)]
    (entry,) = Collector(16, tmp_path / "cache").collect([spec(tmp_path / "photos")]).entries
    assert _decode(entry).shape == (3, 30, 40)


@pytest.mark.skipif(not features.check("avif"), reason="this version of Pillow can't read AVIF")
def test_avif_is_read(tmp_path):
    for name in ("a.avif", "unnamed"):
        (tmp_path / name[0]).mkdir()
        test_image_is_recognised_by_name_or_content(tmp_path / name[0], name, "AVIF")


def test_other_files_are_skipped(tmp_path):
    for name in ("LICENSE", "notes.docx", "a.txt", "b.caption", "c.json"):
        (tmp_path / name).write_bytes(b"words, many words, and more words")
    (tmp_path / "empty").write_bytes(b"")
    assert list(Folder(str(tmp_path)).items()) == []


@pytest.mark.parametrize(("name", "package", "extra"), [("a.HEIC", "pillow_heif", "heic"), ("a.jxl", "pillow_jxl", "jxl")])
def test_format_of_a_missing_extra_is_listed_with_the_package(tmp_path, monkeypatch, name, package, extra):
    monkeypatch.setattr(formats, "decoder", lambda _: False)
    (tmp_path / name).write_bytes(b"x")
    (item,) = Folder(str(tmp_path)).items()
    assert f"pip install 'dreambooth-lab[{extra}]', or convert it to PNG or JPEG" in item.problem
    monkeypatch.setattr(formats, "decoder", lambda wanted: wanted == package)
    assert next(Folder(str(tmp_path)).items()).problem is None


@pytest.mark.parametrize(("kind", "package"), [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_format_of_an_installed_extra_is_read(tmp_path, kind, package):
    pytest.importorskip(package)
    formats.decoder.cache_clear()
    assert formats.decoder(package) and package in sys.modules
    test_image_is_recognised_by_name_or_content(tmp_path, "phone" + {"HEIF": ".heic", "JXL": ".jxl"}[kind], kind)


@pytest.mark.parametrize("remote", [False, True])
def test_hidden_and_system_folders_are_skipped_with_one_notice(tmp_path, remote):
    folder = tiny.save_photos(tmp_path / "photos", [(40, 30)] * 3)
    for name in (".ipynb_checkpoints", "@eaDir", ".thumbnails", ".Trash-1000", "__MACOSX", "sub/@eaDir"):
        (folder / name).mkdir(parents=True)
        (folder / name / "copy.png").write_bytes(saved("PNG"))
    (folder / "._00.png").write_bytes(b"a fork")
    (folder / "Thumbs.db").write_bytes(b"\xff\xd8\xffthumbs")
    (folder / ".DS_Store").write_bytes(b"x")
    source = Remote(f"file://{folder}") if remote else Folder(str(folder))
    assert [item.name for item in source.items()] == ["00.png", "01.png", "02.png"]
    (notice,) = source.notices
    for name in (".ipynb_checkpoints/", "@eaDir/", ".thumbnails/", ".Trash-1000/", "__MACOSX/", "sub/@eaDir/", "._00.png"):
        assert name in notice
    assert "Thumbs.db" not in notice and "DS_Store" not in notice
    assert len(Collector(16, tmp_path / "cache").collect([spec(folder)]).notices) == 1


def test_masks_inside_the_photo_folder_are_not_photos(tmp_path):
    folder = tiny.save_photos(tmp_path / "photos", [(40, 30)] * 2)
    tiny.save_photos(folder / "masks", [(40, 30)] * 2)
    where = Where(enums.DatasetType.folder, str(folder / "masks"))
    done = Collector(16, tmp_path / "cache").collect([spec(folder, masks=Masks(enums.MaskFrom.files, "masks", where))])
    assert not done.problems and [e.picture.name for e in done.entries] == ["00.png", "01.png"]
    assert all(e.mask for e in done.entries) and any(n.startswith("masks/ in") for n in done.notices)


def test_class_images_identical_to_instance_images_are_refused(tmp_path):
    folder = tiny.save_photos(tmp_path / "photos", [(40, 30)] * 2)
    below = tiny.save_photos(folder / "dogs", [(40, 30)], seed=5)
    mine, theirs = spec(folder), spec(below, "class", is_class=True, named="prior.path")
    (problem,) = Collector(16, tmp_path / "a").collect([mine, theirs]).problems
    assert problem.startswith("prior.path: 00.png is also the subject's (photos: dogs/00.png)")
    same = spec(folder, "class", is_class=True, named="prior.path")
    assert len(Collector(16, tmp_path / "b").collect([mine, same]).problems) == 3
    assert not Collector(16, tmp_path / "c").collect([mine, same._replace(recaptioned=True)]).problems


def test_caption_with_commas_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    table = tmp_path / "t.csv"
    table.write_text("image,caption\na.png,a photo of sks robot, red, on the beach\n")
    made = Table(Where(enums.DatasetType.table, str(table), "image", ("caption",)))
    with pytest.raises(ConfigError, match=r"line 2, has 4 cells for 2 columns .*put captions with commas in double quotes"):
        list(made.items())
    table.write_text('image,caption\na.png,"a photo of sks robot, red, on the beach"\n')
    assert next(made.items()).captions == ("a photo of sks robot, red, on the beach",)
