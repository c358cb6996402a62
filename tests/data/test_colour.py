"""Images are converted to sRGB before training."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dreambooth_lab.config import enums
from dreambooth_lab.data.preparation.entry import Collector
from dreambooth_lab.data.sources import decode
from dreambooth_lab.data.spec import Captions, DatasetSpec, Shaping, Where

P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))  # columns, adapted to D50


def display_p3() -> bytes:
    """An ICC profile of Display-P3 with sRGB's curve, written by hand."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + b"".join(map(fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249)), **{f"{c}XYZ".encode(): xyz(v) for c, v in zip("rgb", P3, strict=True)}}
    tags |= {f"{c}TRC".encode(): curve for c in "rgb"}
    at, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"lcms", 0x04300000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    return head.ljust(128, b"\0") + table + body


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def png(image: Image.Image, profile: bytes | None, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **({"icc_profile": profile} if profile else {}))
    return data.getvalue()


def near(pixels: torch.Tensor, colour: tuple[int, int, int]) -> bool:
    return (pixels[:, 0, 0].int() - torch.tensor(colour)).abs().max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_display_p3_becomes_srgb(kind):
    data = png(Image.new("RGB", (8, 6), (220, 40, 40)), display_p3(), kind)
    assert near(decode.decode(data), (240, 0, 21)) or kind == "WEBP"  # lossy
    assert decode.head(data).colours == "converted" and decode.decode(data).shape == (3, 6, 8)


def test_transparency_and_palettes_are_converted():
    seen = Image.new("RGBA", (8, 6), (220, 40, 40, 255))
    seen.putpixel((7, 5), (220, 40, 40, 0))
    for image in (seen, Image.new("RGB", (8, 6), (220, 40, 40)).quantize(4)):
        pixels = decode.decode(png(image, display_p3()))
        assert near(pixels, (240, 0, 21))
    assert decode.decode(png(seen, display_p3()))[:, 5, 7].tolist() == [255, 255, 255], "transparent parts become white"


def test_srgb_and_untagged_images_are_unchanged():
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for profile in (None, srgb()):
        for mode in ("RGB", "L"):
            image = Image.fromarray(noise).convert(mode)
            data = png(image, profile if mode == "RGB" else None)
            assert decode.head(data).colours == ""
            assert torch.equal(decode.decode(data), torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


@pytest.mark.parametrize("profile", [b"rubbish", display_p3()[:200], b"\0" * 400])
def test_damaged_profile_is_reported_and_the_image_unchanged(tmp_path: Path, profile):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(Image.new("RGB", (8, 6), (220, 40, 40)), profile))
    (folder / "b.png").write_bytes(png(Image.new("RGB", (8, 6), (220, 40, 40)), None))
    spec = DatasetSpec(
        "p", Where(enums.DatasetType.folder, str(folder)), Captions(enums.CaptionKind.instanceprompt, ("a dog",)), Shaping(64)
    )  # fmt: skip
    for _ in range(2):  # from the scan cache
        done = Collector(16, tmp_path / "cache").collect([spec])
        (notice,) = done.notices
        assert notice.startswith("a.png: its colour profile can't be used (") and notice.endswith("are interpreted as sRGB")
    assert decode.decode((folder / "a.png").read_bytes())[:, 0, 0].tolist() == [220, 40, 40]
    a, b = done.entries
    assert a.picture.colours and not b.picture.colours


def test_converted_image_is_encoded_again(tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(Image.new("RGB", (8, 6)), display_p3()))
    spec = DatasetSpec(
        "p", Where(enums.DatasetType.folder, str(folder)), Captions(enums.CaptionKind.instanceprompt, ("a dog",)), Shaping(64)
    )  # fmt: skip
    (entry,) = Collector(16, tmp_path / "cache").collect([spec]).entries
    as_it_was = entry._replace(picture=entry.picture._replace(colours=""))
    assert entry.key(0, "vae") != as_it_was.key(0, "vae")
