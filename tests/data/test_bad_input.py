"""A corpus of bad input. Each input is refused before step 0 with a message that names it and a fix, or used correctly; none
crashes, and none is ignored silently."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import samples
import tiny
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, enums
from dreambooth_lab.data.caching.fill import Stores, _decode, fill_masks
from dreambooth_lab.data.planning import plan
from dreambooth_lab.data.preparation import geometry
from dreambooth_lab.data.preparation.entry import Collector
from dreambooth_lab.data.sources.folder import Folder
from dreambooth_lab.data.spec import Captions, DataPlan, DatasetSpec, Masks, Shaping, Where


def png(size=(40, 30), mode="RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, 90 if mode == "L" else None or 0).save(data, "PNG")
    return data.getvalue()


def saved(kind: str, size=(40, 30), mode="RGB", **options) -> bytes:
    data = io.BytesIO()
    Image.new(mode, size).save(data, kind, **options)
    return data.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 50,000 × 50,000 pixels."""
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def noisy() -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def frames() -> bytes:
    first, second = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=[second], lossless=True)
    return data.getvalue()


# file name, content, message at the scan or at decoding; None: it is used
IMAGES = [
    ("zero.jpg", b"", "the file is empty"),
    ("text.png", b"not an image", "not an image of a known format"),
    ("html.jpg", b"<html><body>404</body></html>", "not an image of a known format"),
    ("truncated-header.png", png()[:20], "can't be read"),
    ("truncated-body.png", noisy()[: len(noisy()) // 2], "can't be decoded"),
    ("truncated-body.jpg", saved("JPEG", (400, 400), quality=95)[:700], "can't be"),
    ("flipped-bytes.png", noisy()[:200] + bytes(100) + noisy()[300:], "can't be decoded"),
    ("bomb.png", bomb(), "decompression bomb"),
    ("long-and-thin.png", png((20_000, 3)), None),
    ("phone.heic", b"\0\0\0\x18ftypheic", "can't be read" if find_spec("pillow_heif") else "convert it to PNG or JPEG"),
    ("moving.gif", saved("GIF"), "convert it to PNG or JPEG"),
    ("camera.dng", b"II*\0", "convert it to PNG or JPEG"),
    ("null.tiff", b"II*\0" + bytes(30), "can't be read"),
    ("one-pixel.png", png((1, 1)), None),
    ("really-a-jpeg.png", saved("JPEG"), None),
    ("UPPER.JPEG", saved("JPEG"), None),
    ("cmyk.jpg", saved("JPEG", mode="CMYK"), None),
    ("grey-alpha.png", png(mode="LA"), None),
    ("palette.png", png(mode="P"), None),
    ("one-bit.png", png(mode="1"), None),
    ("sixteen-bit.png", png(mode="I;16"), None),
    ("float.tiff", saved("TIFF", mode="F"), None),
    ("two-frames.webp", frames(), None),
    ("trailing.png", png() + b"rubbish after the end", None),
    ("ünïcödé 漢字 🐕.png", png(), None),
    ("two.dots.in.name.png", png(), None),
    ("with space .png", png(), None),
]


def spec(folder: Path, **changes) -> DatasetSpec:
    where = changes.pop("where", Where(enums.DatasetType.folder, str(folder)))
    made = DatasetSpec("photos", where, Captions(enums.CaptionKind.instanceprompt, ("a dog",)), Shaping(64, minimum=0))
    return made._replace(**changes)


def collect(tmp_path: Path, one: DatasetSpec):
    return Collector(16, tmp_path / "cache").collect([one])


@pytest.mark.parametrize(("name", "data", "message"), IMAGES, ids=[name for name, _, _ in IMAGES])
def test_image_is_used_or_reported(tmp_path, name, data, message):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / name).write_bytes(data)
    (folder / "good.png").write_bytes(png())
    done = collect(tmp_path, spec(folder))
    reasons = [r.reason for r in done.rejected["photos"] if r.name == name]
    entry = next((e for e in done.entries if e.picture.name == name), None)
    if entry is not None and isinstance(reason := _decode(entry), str):
        reasons.append(reason)
    if message is None:
        assert not reasons and tuple(_decode(entry).shape[1:]) == entry.picture.size
    else:
        assert len(reasons) == 1 and message.lower() in reasons[0].lower()
    assert done.found["photos"] == 2 and "good.png" in {e.picture.name for e in done.entries}


def test_animation_gives_its_first_frame(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.webp").write_bytes(frames())
    assert _decode(collect(tmp_path, spec(tmp_path / "photos")).entries[0])[:, 0, 0].tolist() == [255, 0, 0]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((30, 40), 32768, dtype=np.uint16)).save(tmp_path / "photos/a.png")
    assert _decode(collect(tmp_path, spec(tmp_path / "photos")).entries[0])[:, 0, 0].tolist() == [128] * 3


def loop(folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below/a.png").write_bytes(png())
    (folder / "below/up").symlink_to(folder)


def dangling(folder: Path) -> None:
    (folder / "a.png").symlink_to(folder / "gone.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "b.png").write_bytes(png())


def directory_named_as_image(folder: Path) -> None:
    (folder / "a.png").mkdir()
    (folder / "a.png/b.png").write_bytes(png())


@pytest.mark.parametrize(("make", "names", "rejected"), [
    (loop, ["below/a.png"], []),
    (dangling, ["b.png"], ["a.png", "self.png"]),
    (directory_named_as_image, ["a.png/b.png"], []),
])  # fmt: skip
def test_links_and_unusual_folders_are_handled(tmp_path, make, names, rejected):
    folder = tmp_path / "photos"
    folder.mkdir()
    make(folder)
    done = collect(tmp_path, spec(folder))
    assert [e.picture.name for e in done.entries] == names
    assert sorted(r.name for r in done.rejected["photos"]) == rejected


def test_unreadable_file_is_reported(tmp_path, monkeypatch):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "b.png").write_bytes(png())
    real = Folder.read

    def read(self, name):
        if name == "a.png":
            raise PermissionError(13, "Permission denied")
        return real(self, name)

    monkeypatch.setattr(Folder, "read", read)
    done = collect(tmp_path, spec(folder))
    assert [(r.name, "Permission denied" in r.reason) for r in done.rejected["photos"]] == [("a.png", True)]


@pytest.mark.parametrize("make", ["missing", "file", "empty", "only text"])
def test_folders_without_images_are_refused(tmp_path, make):
    place = tmp_path / "photos"
    if make == "file":
        place.write_text("x")
    elif make != "missing":
        place.mkdir()
    if make == "only text":
        (place / "a.txt").write_text("x")
    done = collect(tmp_path, spec(place))
    assert not done.entries
    assert {"missing": "does not exist", "file": "is a file"}.get(make, "") in "".join(done.problems)
    assert bool(done.problems) == (make in ("missing", "file"))  # the data module reports the others: no usable image


@pytest.mark.parametrize(("text", "message"), [
    (None, "a.txt is missing"), ("", "a.txt is empty"), (" \n\n ", "a.txt is empty"), (b"\xff\xfe\x00", "a.txt is not UTF-8"),
])  # fmt: skip
def test_missing_caption_is_reported_by_name(tmp_path, text, message):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    if text is not None:
        (folder / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = collect(tmp_path, spec(folder, captions=Captions(enums.CaptionKind.textfile)))
    assert len(done.problems) == 1 and message in done.problems[0] and "photos: a.png" in done.problems[0]


def mask_problems(tmp_path, masks: dict[str, bytes], images=("a.png", "sub/b.jpg")) -> tuple[list[str], list[str], list]:
    folder, place = tmp_path / "photos", tmp_path / "masks"
    for root, files in ((folder, dict.fromkeys(images, png((80, 60)))), (place, masks)):
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        root.mkdir(exist_ok=True)
    done = collect(tmp_path, spec(folder, masks=Masks(enums.MaskFrom.files, "m", Where(enums.DatasetType.folder, str(place)))))
    entries, problems = fill_masks(Stores(tmp_path / "cache"), done.entries, 8)
    return done.problems + problems, done.notices, entries


WHITE, BLACK = saved("PNG", (80, 60), "RGB"), png((80, 60), "RGB")
WHITE = (lambda d: (Image.new("L", (80, 60), 255).save(d, "PNG"), d.getvalue())[1])(io.BytesIO())
SMALL = (lambda d: (Image.new("L", (40, 30), 255).save(d, "PNG"), d.getvalue())[1])(io.BytesIO())
SQUARE = (lambda d: (Image.new("L", (50, 50), 255).save(d, "PNG"), d.getvalue())[1])(io.BytesIO())

MASKS = [
    ({"a.webp": WHITE, "sub/b.png": WHITE}, []),
    ({"a.png": WHITE}, ["sub/b.jpg: has no mask; create sub/b.png"]),
    ({}, ["a.png: has no mask", "sub/b.jpg: has no mask"]),
    ({"a.png": WHITE, "b.png": WHITE}, ["sub/b.jpg: has no mask"]),
    ({"a.png": BLACK, "sub/b.png": WHITE}, ["mask a.png is all black"]),
    ({"a.png": BLACK, "sub/b.png": BLACK}, ["mask a.png is all black", "mask sub/b.png is all black"]),
    ({"a.png": SMALL, "sub/b.png": WHITE}, []),
    ({"a.png": SQUARE, "sub/b.png": WHITE}, ["mask a.png is 50×50 px, the image 80×60"]),
    ({"a.png": b"", "sub/b.png": WHITE}, ["a.png: its mask a.png can't be read"]),
    ({"a.png": WHITE[:60], "sub/b.png": WHITE}, ["its mask a.png can't be"]),
    ({"a.jpg": WHITE, "a.bmp": WHITE, "sub/b.png": WHITE}, ["a.png: has 2 masks, a.bmp, a.jpg; keep one"]),
    ({"a.jpg": BLACK, "a.png": WHITE, "sub/b.png": WHITE}, []),
]


@pytest.mark.parametrize(("masks", "message"), MASKS, ids=range(len(MASKS)))
def test_masks_are_paired_or_all_problems_are_listed(tmp_path, masks, message):
    problems, _, entries = mask_problems(tmp_path, masks)
    assert len(problems) == len(message) and all(any(text in problem for problem in problems) for text in message), problems
    if not message:
        assert all(entry.mask for entry in entries)


def test_masks_without_images_are_listed(tmp_path):
    problems, notices, _ = mask_problems(tmp_path, {"a.png": WHITE, "sub/b.png": WHITE, "c.png": WHITE})
    assert not problems and notices == ["masks without an image are ignored: c.png"]


def test_image_without_transparency_has_no_alpha_mask(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    Image.new("RGBA", (40, 30), (9, 9, 9, 0)).save(folder / "b.png")
    done = collect(tmp_path, spec(folder, masks=Masks(enums.MaskFrom.alpha, "m", None)))
    _, problems = fill_masks(Stores(tmp_path / "cache"), done.entries, 8)
    assert len(done.problems) == 1 and "a.png: has no transparency" in done.problems[0]
    assert len(problems) == 1 and "b.png is all black" in problems[0]


# entry, and the message about it
ENTRIES = [
    ({"crop": "False"}, 'crop is "False"; it must be true or false, without quotes'),
    ({"crop": 1}, "it must be true or false"),
    ({"resolution": "1024"}, 'resolution is "1024"; it must be a number, without quotes'),
    ({"resolution": True}, "resolution is true"),
    ({"resolution": -1}, "it must be at least"),
    ({"resolution": 1}, 'for megapixels set "resolution_type": "area"'),
    ({"resolution": 1024, "resolution_type": "area"}, 'for pixels set "resolution_type": "pixel_area"'),
    ({"resolution_type": "pixels"}, "did you mean 'pixel'?"),
    ({"repeats": 1.5}, "repeats is 1.5; it must be a whole number"),
    ({"repeats": -1}, "repeats is -1; it must be at least 0"),
    ({"repeat": 3}, "unknown key 'repeat'; did you mean 'repeats'?"),
    ({"instance_promt": "x"}, "did you mean 'instance_prompt'?"),
    ({"zzzzqqqq": 1}, "unknown key 'zzzzqqqq'; remove it"),
    ({"is_regularization_dat": True}, "did you mean 'is_regularization_data'?"),
    ({"instance_data_dir": None}, "it needs instance_data_dir"),
    ({"instance_prompt": None}, 'it needs an "instance_prompt"'),
    ({"instance_prompt": "a photo of ${oc.env:HOME}"}, "would interpret as a reference"),
    ({"instance_prompt": ["a", 3]}, "must be a list of strings"),
    ({"caption_strategy": "text"}, "it must be one of instanceprompt"),
    ({"caption_strategy": "parquet"}, "it needs a caption_column"),
    ({"crop": True, "crop_style": "face"}, "it must be one of center"),
    ({"crop": True, "crop_aspect": "closest"}, 'needs "crop_aspect_buckets"'),
    ({"crop_aspect_buckets": [1, "2"]}, "must be numbers above 0"),
    ({"maximum_image_size": 512}, "must be given together"),
    ({"minimum_image_size": 900, "maximum_image_size": 512, "target_downsample_size": 400}, "is above maximum_image_size"),
    ({"id": None}, "it needs an id"),
    ({"id": "  "}, "it needs an id"),
    ({"id": "../../etc/passwd"}, "an id names a dataset, not a path"),
    ({"id": ".."}, "an id names a dataset, not a path"),
    ({"id": "a\\..\\b"}, "an id names a dataset, not a path"),
    ({"id": 7}, "id is 7; it must be a string"),
    ({"dataset_type": "video"}, "it must be one of image"),
    ({"type": "webshart"}, "it must be one of local"),
    ({"train_batch_size": 4}, "train_batch_size is not supported here: all datasets share dataset.batch_size"),
    ({"start_step": 100}, "start_step is not supported here"),
    ({"conditioning_data": "masks"}, "no conditioning entry has that id"),
    ({"conditioning_data": ["a", "b"]}, "names 2 entries; an image has one mask"),
    ({"text_embeds": "texts"}, "no text_embeds entry has that id"),
    ({"dataset_type": "conditioning"}, 'it needs "conditioning_type": "mask"'),
    ({"dataset_type": "conditioning", "conditioning_type": "depth"}, "it must be one of mask"),
    ({"instance_data_dir": "{env:NO_SUCH_VARIABLE}/x"}, "{env:NO_SUCH_VARIABLE}, which is not set; export NO_SUCH_VARIABLE="),
    ({"is_regularisation_data": True}, "regularisation data needs a prior: add prior=teacher"),
    ({"disabled": True}, "no entry has images to train on"),
]


@pytest.mark.parametrize(("change", "message"), ENTRIES, ids=[json.dumps(c)[:60] for c, _ in ENTRIES])
def test_invalid_entry_is_explained_before_loading(tmp_path, change, message):
    path = samples.save(tmp_path / "a.json", samples.entry(tmp_path, **change))
    with pytest.raises(ConfigError) as caught:
        plan(lab.compose("dataset=simpletuner", f"dataset.path={path}"))
    assert message in str(caught.value) and str(path) in str(caught.value)


FILES = [
    ('[{"id": "a",}]', "line 1, column 13"),
    ('[\n  {"id": "a"\n   "type": "local"}\n]', "line 3, column 4"),
    ("", "line 1, column 1"),
    ("[", "line 1"),
    ("{}", "contains no list of datasets"),
    ("[]", "contains no list of datasets"),
    ("[1]", "entry 1 is 1; it must be an object"),
    ('[{"id": "a", "id": "b"}]', "key 'id' occurs twice"),
    (b"\xff\xfe[]", "is not UTF-8"),
    ("[" * 100_000, "can't be read"),
    ("// a comment\n[]", "line 1, column 1"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=range(len(FILES)))
def test_malformed_file_is_explained_with_line_and_column(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        plan(lab.compose("dataset=simpletuner", f"dataset.path={path}"))
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_all_problems_of_a_file_are_reported_at_once(tmp_path):
    entries = [
        samples.entry(tmp_path, crop="yes", repeat=1),
        samples.entry(tmp_path),
        samples.entry(tmp_path, id="c", resolution=2),
    ]
    with pytest.raises(ConfigError) as caught:
        plan(lab.compose("dataset=simpletuner", f"dataset.path={samples.save(tmp_path / 'a.json', *entries)}"))
    text = str(caught.value)
    assert (
        text.startswith("4 problem(s)") and "id 'photos' is used by 2 entries" in text and "entry 'c': resolution is 2 px" in text
    )


TABLES = [
    ("", "has no rows"),
    ("image,caption\n", "has no rows"),
    ("file,caption\na.png,x\n", "has no column 'image'"),
    ("image,text\na.png,x\n", "has no column 'caption'"),
    ('image,caption\n"a.png,x\n', "can't be read as a table"),
]


@pytest.mark.parametrize(("text", "message"), TABLES, ids=range(len(TABLES)))
def test_invalid_table_is_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    where = Where(enums.DatasetType.table, str(tmp_path / "t.csv"), "image", ("caption",))
    done = collect(tmp_path, spec(tmp_path, where=where, captions=Captions(enums.CaptionKind.column)))
    assert not done.entries and message in done.problems[0]


def test_invalid_table_rows_are_named(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a.png").write_bytes(png())
    (tmp_path / "out.png").write_bytes(png())
    (tmp_path / "t/t.csv").write_text("image,caption\na.png,x\na.png,y\ngone.png,z\n../out.png,w\n,v\n")
    where = Where(enums.DatasetType.table, str(tmp_path / "t/t.csv"), "image", ("caption",))
    done = collect(tmp_path, spec(tmp_path, where=where, captions=Captions(enums.CaptionKind.column)))
    assert [e.picture.name for e in done.entries] == ["a.png"]
    reasons = {r.name: r.reason for r in done.rejected["photos"]}
    assert len(reasons) == 4 and "is outside of" in reasons["../out.png"] and "listed twice" in reasons["a.png (row 2)"]


def test_the_corpus_is_large_enough():
    assert len(IMAGES) + len(MASKS) + len(ENTRIES) + len(FILES) + len(TABLES) >= 60


def test_rejected_sizes_are_listed_with_the_rule(tmp_path):
    folder = tiny.save_photos(tmp_path / "photos", [(20, 100), (100, 20), (30, 30), (90, 90)])
    rules = Shaping(64, enums.ResolutionType.pixel, minimum=25, least_aspect=0.5, most_aspect=2, max_upscale=2)
    done = collect(tmp_path, spec(folder, shaping=rules))
    assert [e.picture.name for e in done.entries] == ["03.png"]
    assert [r.reason.split(" < ")[0].split(" > ")[0] for r in done.rejected["photos"]] == [
        "short edge 20 px", "short edge 20 px", "it would be enlarged 2.13 times"]  # fmt: skip


def test_images_too_narrow_for_the_resolution_are_rejected():
    assert "20000×3 px is too narrow" in geometry.reason_against((3, 20_000), Shaping(1024), 32)
    assert geometry.reason_against((3, 20_000), Shaping(64), 32) is None
    assert geometry.reason_against((6000, 8000), Shaping(1024), 32) is None


def test_unwritable_cache_folders_are_refused_together(tmp_path):
    (tmp_path / "file").write_text("")
    dataset = spec(tmp_path, latents=str(tmp_path / "file/deeper"))
    with pytest.raises(ConfigError) as caught:
        Stores(tmp_path / "file").place(DataPlan([dataset], [], str(tmp_path / "file")))
    named = ("cache is", "'photos': cache_dir_vae is", "text_embeds: cache_dir is")
    assert all(name in str(caught.value) for name in named) and str(caught.value).count("set another folder") == 3


def test_irregular_files_are_reported_without_blocking(tmp_path):
    folder = tiny.save_photos(tmp_path / "photos", [(40, 30)])
    os.mkfifo(folder / "pipe.png")
    done = collect(tmp_path, spec(folder))
    assert [(r.name, r.reason) for r in done.rejected["photos"]] == [("pipe.png", "is not a regular file")] and len(
        done.entries
    ) == 1
