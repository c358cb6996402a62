"""The page of the training data: its crops are those that are encoded, and unusual photos are named."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from typer.testing import CliRunner, Result

from data.test_colour import display_p3
from dreambooth_lab import lab, sheet
from dreambooth_lab.config import ConfigError
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.factory import build_family
from dreambooth_lab.models.checkpoint import Checkpoint
from dreambooth_lab.tools.inspection.photos import Crop, sharpness
from dreambooth_lab.tools.look import application, inspect_datasets
from dreambooth_lab.toybox.subjects import subject_photos


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """Three different photos with masks and text files: two square, one wide."""
    folder = tmp_path / "album"
    (folder / "masks").mkdir(parents=True)
    for i, size in enumerate([(128, 128), (128, 128), (96, 160)]):
        photo = subject_photos("robot", 3, size)[i]
        photo.image.save(folder / f"{i}.png")
        photo.mask.save(folder / "masks" / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"photo <{i}> of a robot\n")
    return folder


@pytest.fixture
def words(photo_folder: Path, small: list[str], tmp_path: Path) -> list[str]:
    kept = [word for word in small if not word.startswith(("dataset=", "dataset.path=", "cache=", "prior"))]
    overrides = [
        "dataset=masked",
        f"dataset.path={photo_folder}",
        f"dataset.mask_path={photo_folder / 'masks'}",
        "dataset.caption=textfile",
    ]
    return [*kept, *overrides, "prior=none", f"cache={tmp_path / 'cache'}"]


def call(words: list[str], folder: Path) -> Result:
    return CliRunner().invoke(application, [*words, "--output-dir", str(folder)])


def crops(words: list[str]) -> list[Crop]:
    return [crop for one in inspect_datasets(lab.compose(*words), 100).datasets for seen in one.seen for crop in seen.crops]


def test_shown_crops_match_the_encoded_crops(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte in every bucket, including random and mirrored crops; masks are those of the loss on the latent grid."""
    words = [*words, "dataset.resolutions=[32,64]", "dataset.crop=random", "dataset.crop_variants=2", "dataset.flip=true"]
    words += ["dataset.crop_aspect=square"]
    shown = crops(words)
    cfg = lab.compose(*words)
    family = build_family(cfg)
    data, encoded = DreamBoothData(cfg, family), []
    whole = family.encode_image
    monkeypatch.setattr(family, "encode_image", lambda pixels: (encoded.append(pixels), whole(pixels))[1])
    data.prepare()
    assert len(encoded) > 6 and {crop.image.size for crop in shown} == {(32, 32), (64, 64)}

    def made(pixels: torch.Tensor) -> bytes:
        return ((pixels[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().tobytes()

    assert sorted(crop.image.tobytes() for crop in shown) == sorted(made(pixels) for pixels in encoded)
    keys = {crop.entry.mask.key(v, family.factor) for crop in shown for v in crop.entry.variants}
    grids = [data.stores.masks.read(key)["mask"] for key in keys]
    theirs = {(grid * 255).round().byte().numpy().tobytes() for grid in grids}
    assert {np.asarray(crop.mask)[:: family.factor, :: family.factor].tobytes() for crop in shown} == theirs


def test_page_shows_each_crop_with_mask_and_caption(words: list[str], tmp_path: Path) -> None:
    """A photo, its crop, and the crop with its mask, in one self-contained file."""
    result = call(words, tmp_path / "out")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "look.html").read_text()
    images = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(data))).size for data in images]
    assert len(sizes) == 9 and sizes.count((64, 64)) == 4 and (160, 96) in sizes
    assert set(re.findall(r"(?:src|href|url)\W+(\w+)", page)) == {"data"}
    assert all(f"photo &lt;{i}&gt; of a robot" in page for i in range(3)) and page.count("with its mask") == 2 * 3
    assert "copies" not in page and "near-duplicates" not in page and "blurred?" not in page
    with Image.open(tmp_path / "out" / "look.png") as drawn:
        assert drawn.height == 3 * (160 + sheet.TITLE + sheet.GAP) + sheet.GAP, "one row per crop"


def test_captions_are_counted_and_mirrored_crops_are_reported(words: list[str], tmp_path: Path) -> None:
    """In the tests' tokenizers every letter is a token."""
    inspected = inspect_datasets(lab.compose(*words, "dataset.flip=true"), 100)
    captions = {caption for seen in inspected.datasets[0].seen for caption in seen.captions}
    lengths = {caption: len(caption.replace(" ", "")) for caption in captions}
    assert captions and inspected.tokens == {c: {"text_encoder": n, "text_encoder_2": n} for c, n in lengths.items()}
    assert {crop.mirrored for crop in inspected.datasets[0].seen[0].crops} == {False, True}
    call([*words, "dataset.flip=true"], tmp_path / "out")
    page = (tmp_path / "out" / "look.html").read_text()
    assert ", mirrored" in page and f"tokens: {min(lengths.values())} for text_encoder" in page


def test_no_weights_are_loaded(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(Checkpoint, "load", refuse)
    assert crops(words)


def test_duplicates_and_near_duplicates_are_named(words: list[str], photo_folder: Path) -> None:
    """The same bytes, and the same photo as a smaller JPEG; other photos of the subject are neither."""
    (photo_folder / "same.png").write_bytes((photo_folder / "0.png").read_bytes())
    with Image.open(photo_folder / "1.png") as photo:
        photo.resize((100, 100)).save(photo_folder / "near.jpg", quality=70)
    for name, like in (("same", "0"), ("near", "1")):
        (photo_folder / f"{name}.txt").write_text("a robot")
        (photo_folder / "masks" / f"{name}.png").write_bytes((photo_folder / "masks" / f"{like}.png").read_bytes())
    (one,) = inspect_datasets(lab.compose(*words), 100).datasets
    assert one.remarks[0] == "0.png and same.png are duplicates: equal bytes"
    assert one.remarks[1].startswith("1.png and near.jpg are near-duplicates") and len(one.remarks) == 2


def test_blurred_small_and_heavily_cropped_photos_are_named(words: list[str], photo_folder: Path) -> None:
    with Image.open(photo_folder / "0.png") as photo:
        photo.filter(ImageFilter.GaussianBlur(6)).save(photo_folder / "0.png")
    with Image.open(photo_folder / "1.png") as photo:
        photo.resize((24, 24)).save(photo_folder / "1.png")
    (one,) = inspect_datasets(lab.compose(*words, "dataset.crop_aspect=square"), 100).datasets
    remarks = {seen.picture.name: seen.remarks for seen in one.seen}
    assert remarks["0.png"] == [f"blurred? variance of the Laplacian {one.seen[0].sharpness:.3g} < 25"]
    assert remarks["1.png"] == ["small: enlarged 2.67 times for 64×64"]
    assert remarks["2.png"] == ["40% is removed by the crop to 64×64"]


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    """An image of single white points: the Laplacian is 4·255 there, −255 at each neighbour, 0 elsewhere."""
    level = np.zeros((66, 66), dtype=np.uint8)
    level[4:62:8, 4:62:8] = 255
    points, inside = 64, 64 * 64
    assert sharpness(Image.fromarray(level)) == pytest.approx(points * (16 + 4) * 255**2 / inside)
    assert sharpness(Image.new("RGB", (50, 40), "red")) == 0


def test_converted_colour_profiles_are_reported(words: list[str], photo_folder: Path) -> None:
    with Image.open(photo_folder / "0.png") as photo:
        photo.save(photo_folder / "0.png", icc_profile=display_p3())
    assert (
        "colours converted from its ICC profile to sRGB" in inspect_datasets(lab.compose(*words), 100).datasets[0].seen[0].remarks
    )


def test_problems_are_named(words: list[str], photo_folder: Path, tmp_path: Path) -> None:
    (photo_folder / "masks" / "1.png").unlink()
    (photo_folder / "2.png").write_bytes((photo_folder / "2.png").read_bytes()[:300])
    Image.new("L", (128, 128)).save(photo_folder / "masks" / "0.png")
    result = call(words, tmp_path / "out")
    assert result.exit_code == 1
    assert "1.png: has no mask" in result.output and "0.png: its mask 0.png is all black" in result.output
    assert "2.png is not trained on: " in (tmp_path / "out" / "look.html").read_text()


def test_number_of_shown_photos_is_limited(words: list[str]) -> None:
    (one,) = inspect_datasets(lab.compose(*words), 2).datasets
    assert len(one.seen) == 2 and one.remarks == ["1 more are not shown; --most=3 shows them"]


def test_invalid_options_are_refused(words: list[str], tmp_path: Path) -> None:
    for wrong in ("dataset.no_such_key=1", "dataset.path=/no/such/folder"):
        assert isinstance(call([*words, wrong], tmp_path / "out").exception, ConfigError)
    assert not (tmp_path / "out").exists()
