"""The mask generator: segmentation, postprocessing, and training with the written masks."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessorPil
from typer.testing import CliRunner, Result

import tiny
import tiny_captioners
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.factory import build_family
from dreambooth_lab.models import segment
from dreambooth_lab.toybox.subjects import subject_photos
from dreambooth_lab.toybox.world import SUBJECTS

pytest.importorskip("cv2")
from dreambooth_lab.tools.mask_methods.finders import Method, finder
from dreambooth_lab.tools.mask_methods.grabcut import Finish, grabcut
from dreambooth_lab.tools.masks import application, sheet_path


def call(*words: object) -> Result:
    return CliRunner().invoke(application, [str(word) for word in words])


def run(photos: Path, masks: Path, *words: object) -> Result:
    return call("--input_dir", photos, "--output_dir", masks, *words)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """Two subjects, one in a subfolder as a sideways JPEG: 128×96 px on disk, 96×128 as shown."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    subject_photos("robot", 1)[0].image.save(folder / "a.b.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    tall = subject_photos("car", 1, (128, 96))[0].image
    tall.transpose(Image.Transpose.ROTATE_90).save(folder / "more" / "c.jpg", exif=turned, quality=95)
    return folder


def iou(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


def test_grabcut_finds_toybox_subjects() -> None:
    """Known masks: IoU above .75 for each subject, above .85 on average, and better than the best centred discs."""
    finish = Finish(largest_only=True, fill_holes=True)
    scores, baseline = {}, []
    y, x = np.mgrid[:192, :192] / 192 - 0.5
    for name in SUBJECTS:
        drawn = subject_photos(name, 2, (192, 192))
        truths = [np.asarray(photo.mask) > 127 for photo in drawn]
        masks = [finish.of(grabcut(np.asarray(photo.image))) for photo in drawn]
        scores[name] = np.mean([iou(mask > 127, truth) for mask, truth in zip(masks, truths, strict=True) if mask is not None])
        baseline += [max(iou(x**2 + y**2 < r**2, truth) for r in (0.2, 0.25, 0.3, 0.35, 0.4)) for truth in truths]
    print({name: f"{score:.3f}" for name, score in scores.items()}, f"mean {np.mean(list(scores.values())):.3f}")
    assert min(scores.values()) > 0.75
    assert np.mean(list(scores.values())) > max(0.85, float(np.mean(baseline)))


def test_grabcut_is_deterministic_and_stays_in_its_rectangle() -> None:
    photo = np.asarray(subject_photos("cup", 1)[0].image)
    assert np.array_equal(grabcut(photo), grabcut(photo))
    found = grabcut(photo, (30, 20, 60, 80)) > 0.5
    assert found.any() and not found[:, :29].any() and not found[:19].any() and not found[:, 91:].any()


@pytest.fixture
def found() -> np.ndarray:
    """A ring with a hole of 8×8 px, and a separate small square."""
    made = np.zeros((64, 64), dtype=np.float32)
    made[10:34, 10:34] = 0.9
    made[18:26, 18:26] = 0.2
    made[50:54, 50:54] = 0.7
    return made


def test_holes_are_filled_but_concavities_are_not(found: np.ndarray) -> None:
    found[44:64, 0:12], found[48:64, 4:8] = 0.9, 0.0  # a concavity that is open at the image's border
    mask, plain = Finish(fill_holes=True).of(found), Finish().of(found)
    assert mask[18:26, 18:26].all() and not plain[18:26, 18:26].any()
    assert not mask[48:64, 4:8].any()
    mask[18:26, 18:26] = 0
    assert np.array_equal(mask, plain)


def test_only_the_largest_component_is_kept(found: np.ndarray) -> None:
    mask = Finish(largest_only=True).of(found)
    assert mask[10:18, 10:34].all() and not mask[40:].any() and Finish().of(found)[50:54, 50:54].all()


def test_padding_grows_the_mask_by_given_pixels(found: np.ndarray) -> None:
    """A pixel is in the padded mask exactly if one of the mask is within the padding of it."""
    plain, mask = Finish().of(found), Finish(padding=3).of(found)
    inside = np.argwhere(plain > 0)
    near = np.array([[((inside - (y, x)) ** 2).sum(1).min() <= 9 for x in range(64)] for y in range(64)])
    assert np.array_equal(mask > 0, near)


def test_blur_changes_only_the_border(found: np.ndarray) -> None:
    plain, mask = (
        Finish(largest_only=True, fill_holes=True).of(found),
        Finish(largest_only=True, fill_holes=True, blur=4).of(found),
    )
    row = mask[22, :20].astype(int)
    assert (np.diff(row) >= 0).all() and len(set(row.tolist())) > 4
    assert np.array_equal(mask[:5], plain[:5]) and (mask[14:30, 14:30] == 255).all() and abs(int(row[9]) + row[10] - 255) < 3


def test_inverted_mask_is_the_complement(found: np.ndarray) -> None:
    assert np.array_equal(Finish(invert=True, padding=2).of(found), 255 - Finish(padding=2).of(found))


def test_threshold_binarises_and_soft_keeps_grey_values(found: np.ndarray) -> None:
    assert set(np.unique(Finish(threshold=0.1).of(found))) == {0, 255} and Finish(threshold=0.1).of(found)[20, 20] == 255
    soft = Finish(threshold=0.5, soft=True).of(found)
    assert set(np.unique(soft)) == {0, round(0.7 * 255), round(0.9 * 255)}
    assert Finish(threshold=0.95).of(found) is None


def test_masks_have_the_photos_names_and_exif_corrected_sizes(photo_folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    result = run(photo_folder, masks, "--text_input", "robot")  # SimpleTuner's command
    assert result.exit_code == 0 and "--text_input='robot' is not used by grabcut" in result.output
    assert {p.relative_to(masks).as_posix() for p in masks.rglob("*") if p.is_file()} == {"a.b.png", "more/c.png"}
    assert read(masks / "a.b.png").shape == (128, 128) and read(masks / "more" / "c.png").shape == (128, 96)
    truth = np.asarray(subject_photos("car", 1, (128, 96))[0].mask) > 127
    assert iou(read(masks / "more" / "c.png") > 127, truth) > 0.5  # upright by EXIF orientation, not as stored
    with Image.open(tmp_path / "contact_sheet_masks.png") as sheet:
        assert sheet.height > 2 * 128  # a row for each


def test_photos_without_a_mask_are_named_and_have_no_file(photo_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), "teal").save(photo_folder / "plain.png")
    (photo_folder / "torn.png").write_bytes((photo_folder / "a.b.png").read_bytes()[:200])
    Image.new("RGB", (80, 60), "teal").save(photo_folder / "a.b.webp")
    result = run(photo_folder, tmp_path / "masks")
    assert result.exit_code == 1
    assert "no mask: plain.png: nothing was found" in result.output and "no mask: torn.png: can't be decoded" in result.output
    assert "no mask: a.b.webp: a.b.png has the same name" in result.output
    assert {p.name for p in (tmp_path / "masks").rglob("*.*")} == {"a.b.png", "c.png"}


def test_second_run_writes_only_missing_masks(photo_folder: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    run(photo_folder, masks)
    by_hand = Image.new("L", (128, 128), 200)
    (masks / "a.b.png").unlink()
    by_hand.save(masks / "a.b.webp", lossless=True)  # another extension still matches this photo
    (masks / "more" / "c.png").unlink()
    result = run(photo_folder, masks)
    assert "1 masks made, 1 existed already" in result.output
    assert (masks / "more" / "c.png").is_file() and not (masks / "a.b.png").exists()
    by_hand.resize((96, 128)).save(masks / "more" / "c.png")
    run(photo_folder, masks)
    assert (read(masks / "more" / "c.png") == 200).all()
    run(photo_folder, masks, "--force")
    assert not (read(masks / "more" / "c.png") == 200).all()


@pytest.mark.parametrize("inside", [True, False])
def test_written_masks_can_be_trained_with(inside: bool, photo_folder: Path, tmp_path: Path, small: list[str]) -> None:
    """Every photo is paired with its mask, and neither masks nor the sheet are read as photos."""
    masks = photo_folder / "masks" if inside else tmp_path / "masks"
    assert run(photo_folder, masks, "--largest_only", "--fill_holes", "--padding=2").exit_code == 0
    words = [word for word in small if not word.startswith(("dataset=", "dataset.path=", "cache="))]
    words += ["dataset=masked", f"dataset.path={photo_folder}", f"dataset.mask_path={masks}", f"cache={tmp_path / 'cache'}"]
    cfg = lab.compose(*words)
    data = DreamBoothData(cfg, build_family(cfg))
    data.prepare()
    summary = next(s for s in data.summaries() if not s.spec.is_class)
    assert (summary.found, summary.masks, summary.rejected) == (2, 2, [])
    assert not [notice for notice in data.notices if "without an image" in notice]


def test_alpha_becomes_a_mask(tmp_path: Path) -> None:
    photo = subject_photos("fish", 1)[0]
    cut = photo.image.copy()
    cut.putalpha(photo.mask)
    (tmp_path / "photos").mkdir()
    cut.save(tmp_path / "photos" / "a.png")
    photo.image.save(tmp_path / "photos" / "b.png")
    result = run(tmp_path / "photos", tmp_path / "masks", "--method=alpha", "--soft", "--threshold=0.004")
    assert result.exit_code == 1 and "no mask: b.png: has no transparency" in result.output
    assert np.array_equal(read(tmp_path / "masks" / "a.png"), np.where(np.asarray(photo.mask) > 1, photo.mask, 0))


@pytest.fixture(scope="session")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clipseg")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 8}
    text = layers | {"vocab_size": 514, "eos_token_id": 513, "bos_token_id": 512, "max_position_embeddings": 77}
    config = CLIPSegConfig(
        text_config=text, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=8, reduce_dim=8,
        extract_layers=[0, 1, 2], decoder_num_attention_heads=2, decoder_intermediate_size=16, conditional_layer=0,
    )  # fmt: skip
    CLIPSegForImageSegmentation(config).save_pretrained(folder)
    images = ViTImageProcessorPil(size={"height": 32, "width": 32})
    CLIPSegProcessor(image_processor=images, tokenizer=tiny.tokenizer()).save_pretrained(folder)
    return folder


def test_clipseg_uses_the_text_and_keeps_the_photo_size(clipseg: Path, photo_folder: Path, tmp_path: Path) -> None:
    """A random network: its masks are meaningless, but have names and sizes and depend on the text."""
    result = run(photo_folder, tmp_path / "masks", "--text_input", "a robot", "--model", clipseg, "--threshold=0", "--soft")
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "masks" / "a.b.png").shape == (128, 128) and read(tmp_path / "masks" / "more" / "c.png").shape == (
        128,
        96,
    )
    photo = Image.open(photo_folder / "a.b.png")
    robot, house = (finder(Method.text, text, str(clipseg), None)(b"", photo) for text in ("a robot", "house"))
    assert robot.min() >= 0 and robot.max() <= 1 and not np.array_equal(robot, house)


def test_florence2_polygons_for_the_text_are_filled(photo_folder: Path, tmp_path: Path) -> None:
    """A random network whose output is not a polygon: no mask, and each photo is named. Then an output in the trained format."""
    place = str(tiny_captioners.florence2(tmp_path / "florence"))
    result = run(photo_folder, tmp_path / "masks", "--text_input", "a robot", "--model", place)
    assert result.exit_code == 1 and "no mask: a.b.png: nothing was found" in result.output
    network = segment.load(place, "--model", torch.device("cpu"))
    assert isinstance(network, segment.Florence2)
    text = "</s><s><loc_250><loc_500><loc_750><loc_500><loc_750><loc_999><loc_250><loc_999></s>"
    mask = network.drawn(text, (80, 40))
    assert mask.shape == (40, 80) and mask[22:38, 22:58].all() and not mask[:18].any() and not mask[:, :18].any()
    token_ids = network.processor(text=segment.TASK + "a robot", images=Image.open(photo_folder / "a.b.png")).input_ids[0]
    assert "Locate a robot in the image with mask" in network.processor.tokenizer.decode(token_ids)


def test_rembg_loads_a_local_network_file(photo_folder: Path, tmp_path: Path) -> None:
    """A network that returns the mean over the colours: bright pixels are the subject."""
    pytest.importorskip("rembg")
    onnx = pytest.importorskip("onnx")
    kinds = [("in", 3), ("out", 1)]
    given, output = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", channels, 320, 320]) for name, channels in kinds
    )
    node = onnx.helper.make_node("ReduceMean", ["in"], ["out"], axes=[1], keepdims=1)
    graph = onnx.helper.make_graph([node], "mean", [given], [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "mean.onnx")
    photo = Image.open(photo_folder / "a.b.png").convert("RGB")
    found = finder(Method.rembg, None, str(tmp_path / "mean.onnx"), None)(b"", photo)
    bright = np.asarray(photo, dtype=np.float32).mean(-1)
    assert found.shape == bright.shape and np.corrcoef(found.ravel(), bright.ravel())[0, 1] > 0.95


def test_invalid_options_are_refused(photo_folder: Path, tmp_path: Path) -> None:
    for words, message in [
        (["--method=text"], "--text_input is None"),
        (["--model=x"], "--method=grabcut does not use"),
        (["--text_input=dog", f"--model={tmp_path}"], "could not be loaded"),
        (["--rect=0.5,0.5,0.6,0.2"], "shares of the sides"),
        (["--rect=0,0,1,1"], "some background outside"),
        ([f"--output_dir={photo_folder / 'a.b.png'}"], "which is a file"),
        ([f"--input_dir={tmp_path / 'none'}"], "which is not a folder"),
        (["--method=rembg"], "give an .onnx file"),
        (["--method=rembg", f"--model={photo_folder / 'a.b.png'}"], "give an .onnx file"),
        (["--method=alpha", "--rect=0,0,1,1"], "--method=alpha does not use"),
    ]:
        error = run(photo_folder, tmp_path / "masks", *words).exception
        assert isinstance(error, ConfigError) and message in str(error), words
    assert "own folder" in str(run(photo_folder, photo_folder).exception)


def test_missing_library_is_named_with_its_extra(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    error = run(photo_folder, tmp_path / "masks").exception
    assert isinstance(error, ConfigError) and "pip install 'dreambooth-lab[masks]'" in str(error)


def test_simpletuner_options_are_accepted(photo_folder: Path, tmp_path: Path) -> None:
    run(photo_folder, tmp_path / "ours", "--invert", "--padding=3", "--blur=2")
    assert run(photo_folder, tmp_path / "theirs", "--invert_mask", "--mask_padding=3", "--mask_blur=2").exit_code == 0
    for name in ("a.b.png", "more/c.png"):
        assert np.array_equal(read(tmp_path / "ours" / name), read(tmp_path / "theirs" / name))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 3), (9, 7), (64, 64)])
@pytest.mark.parametrize("colour", [True, False])
def test_arbitrary_images_are_segmented(size: tuple[int, int], colour: bool) -> None:
    """Any size and content, including noise and flat colours, gives values in [0, 1]."""
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    found = grabcut(noise if colour else np.full((*size, 3), 90, np.uint8))
    assert found.shape == size and found.min() >= 0 and found.max() <= 1


def test_sheet_is_written_beside_the_folders() -> None:
    assert sheet_path(Path("/d/dog"), Path("/d/dog/masks")) == Path("/d/contact_sheet_dog_masks.png")
    assert sheet_path(Path("/d/dog"), Path("/m/dog")) == Path("/m/contact_sheet_dog.png")
