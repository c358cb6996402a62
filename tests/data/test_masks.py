import pytest
import torch
from PIL import Image, ImageOps

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check
from dreambooth_lab.data.module import DreamBoothData, Samples
from dreambooth_lab.factory import build_family


@pytest.fixture
def masked(small, tmp_path):
    """Black and white images, with masks that are their own thresholds."""
    folder, masks = tmp_path / "photos", tmp_path / "masks"
    for i, size in enumerate([(100, 80), (60, 120)]):
        photo = (
            Image.effect_noise(size, 200).resize((9, 7)).resize(size, Image.Resampling.NEAREST).point(lambda v: 255 * (v > 127))
        )
        for root, name in ((folder, f"deep/{i}.png"), (masks, f"deep/{i}.bmp")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            photo.save(root / name)

    words = [w for w in small if not w.startswith(("dataset=", "dataset.path", "prior", "cache"))]

    def make(*overrides):
        own = (f"dataset.path={folder}", f"dataset.mask_path={masks}", "dataset.batch_size=1")
        cfg = lab.compose("dataset=masked", *words, *own,
                          f"cache={tmp_path / 'cache'}", *overrides)  # fmt: skip
        check(cfg)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        return data

    make.folder, make.masks = folder, masks
    return make


STYLES = [
    (), ("dataset.crop=corner",), ("dataset.crop=random", "dataset.crop_variants=3"), ("dataset.crop_aspect=square",),
    ("dataset.flip=true",), ("dataset.crop_aspect=closest", "dataset.crop_aspects=[0.5,1.0,2.0]"),
    ("dataset.crop_aspect=random", "dataset.crop_aspects=[0.5,1.0,2.0]", "dataset.crop_variants=4"),
    ("dataset.crop=random", "dataset.crop_aspect=square", "dataset.maximum_image_size=80", "dataset.target_downsample_size=78"),
    ("dataset.resolution_type=pixel",),
]  # fmt: skip


@pytest.mark.parametrize("style", STYLES, ids=[" ".join(s).replace("dataset.", "") or "default" for s in STYLES])
def test_image_and_mask_stay_aligned_under_every_crop_style(masked, monkeypatch, style):
    """The encoder's input, averaged over latent cells, equals the mask of its latents."""
    shown = {}
    from dreambooth_lab.models.sdxl import SDXL

    real = SDXL.encode_image

    def encode_image(self, pixels):
        mean, std = real(self, pixels)
        shown[mean[0].numpy().tobytes()] = pixels
        return mean, std

    monkeypatch.setattr(SDXL, "encode_image", encode_image)
    data = masked(*style)
    stream = iter(Samples(data, data.schedule, 0, 0, 1))
    for batch in (next(stream) for _ in range(12)):
        pixels = (shown[batch.mean[0].numpy().tobytes()][:, :1] + 1) / 2
        assert torch.allclose(batch.mask, torch.nn.functional.avg_pool2d(pixels, 8), atol=1e-6)
        assert 0 < batch.mask.mean() < 1


def test_alpha_is_a_mask(masked, tmp_path):
    for path in masked.folder.rglob("*.png"):
        with Image.open(path) as image:
            grey = ImageOps.invert(image.convert("L"))
            image.convert("RGB").putalpha(grey)
            merged = image.convert("RGB")
            merged.putalpha(grey)
            merged.save(path)
    data = masked("dataset.mask_from=alpha", "dataset.mask_path=null")
    batch = data.build(data.schedule.batch(0))
    assert batch.mask is not None and 0 < batch.mask.mean() < 1


def test_all_mask_problems_are_reported_before_encoding(masked, monkeypatch):
    (masked.masks / "deep/0.bmp").unlink()
    Image.new("L", (60, 120)).save(masked.masks / "deep/1.bmp")
    from dreambooth_lab.models.sdxl import SDXL

    monkeypatch.setattr(SDXL, "_load", lambda *a: pytest.fail("an encoder was loaded"))
    with pytest.raises(ConfigError) as caught:
        masked()
    text = str(caught.value)
    assert text.startswith("2 problem(s)") and "deep/0.png: has no mask" in text and "deep/1.bmp is all black" in text


def test_dataset_masked_requires_a_mask_folder(photos):
    with pytest.raises(ConfigError, match=r"needs dataset\.mask_path=FOLDER"):
        check(lab.compose("dataset=masked", f"dataset.path={photos}"))
