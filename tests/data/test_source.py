import numpy as np
import pytest
from PIL import Image

from dreambooth_lab.data.sources.decode import decode
from dreambooth_lab.data.sources.folder import Folder
from dreambooth_lab.data.sources.scan import ScanCache, scan


def scan_folder(folder):
    return scan(Folder(str(folder)), ScanCache(folder.parent / "memory"))[:2]


def read(image):
    return decode(image.source.read(image.name))


def only_image(folder, name):
    found, _ = scan_folder(folder)
    return next(p for p in found if p.name == name)


def test_images_are_found_recursively_and_sorted(tmp_path):
    (tmp_path / "b" / "ü").mkdir(parents=True)
    for name in ("b/ü/z.JPG", "a.png", "b/c.webp"):
        Image.new("RGB", (30, 20), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    found, rejected = scan_folder(tmp_path)
    assert [p.name for p in found] == ["a.png", "b/c.webp", "b/ü/z.JPG"] and not rejected
    assert found[0].size == (20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    (found,), _ = scan_folder(tmp_path)
    assert tuple(read(found).shape[1:]) == found.size == ((40, 20) if orientation > 4 else (20, 40))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode in ("CMYK", "I;16") else "png"
    Image.new(mode, (12, 10), 0).save(tmp_path / f"a.{suffix}")
    pixels = read(only_image(tmp_path, f"a.{suffix}"))
    assert pixels.shape == (3, 10, 12) and pixels.dtype.itemsize == 1


def test_transparency_becomes_white(tmp_path):
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown = read(only_image(tmp_path, "a.png"))
    assert (shown[:, :2] == 0).all() and (shown[:, 2:] == 255).all()


def test_unusable_files_are_listed_with_the_reason(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no png")
    (tmp_path / "empty.jpg").touch()
    Image.new("RGB", (90, 90)).save(tmp_path / "good.png")
    found, rejected = scan_folder(tmp_path)
    assert [p.name for p in found] == ["good.png"]
    assert {r.name for r in rejected} == {"broken.png", "empty.jpg"}
