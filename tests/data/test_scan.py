import pytest

import tiny
from dreambooth_lab.data.sources import scan
from dreambooth_lab.data.sources.folder import Folder, Remote
from dreambooth_lab.data.sources.scan import ScanCache


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(scan, "STABLE_AFTER", -1.0)  # newly written files count as old


def test_warm_start_reads_no_image_and_finds_the_same(tmp_path, monkeypatch):
    folder = tiny.save_photos(tmp_path / "photos", [(40, 30)] * 5)
    (folder / "broken.png").write_bytes(b"x")
    source, memory = Folder(str(folder)), ScanCache(tmp_path / "memory")
    cold = scan.scan(source, memory)
    assert cold.read == 6 and len(cold.pictures) == 5
    monkeypatch.setattr(Folder, "read", lambda *a: pytest.fail("an image was read"))
    warm = scan.scan(source, memory)
    assert warm.read == 0 and warm[:2] == cold[:2]


def test_only_changed_files_are_read(tmp_path):
    folder = tiny.save_photos(tmp_path / "photos", [(40, 30)] * 5)
    source, memory = Folder(str(folder)), ScanCache(tmp_path / "memory")
    before = {p.name: p.digest for p in scan.scan(source, memory).pictures}
    data = bytearray((folder / "02.png").read_bytes())
    data[-20] ^= 1
    (folder / "02.png").write_bytes(data)
    (folder / "03.png").unlink()
    (folder / "04.png").rename(folder / "new.png")
    after = scan.scan(source, memory)
    assert after.read == 2
    digests = {p.name: p.digest for p in after.pictures}
    assert digests["02.png"] != before["02.png"] and digests["new.png"] == before["04.png"] and "03.png" not in digests


def test_recently_written_file_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "STABLE_AFTER", 60.0)
    folder = tiny.save_photos(tmp_path / "photos", [(40, 30)])
    source, memory = Folder(str(folder)), ScanCache(tmp_path / "memory")
    assert [scan.scan(source, memory).read for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 1, "pictures": {"00.png": ["x"]}, "sum": "y"}'])
def test_damaged_scan_cache_is_rebuilt(tmp_path, damage):
    folder = tiny.save_photos(tmp_path / "photos", [(40, 30)])
    source, memory = Folder(str(folder)), ScanCache(tmp_path / "memory")
    scan.scan(source, memory)
    next((tmp_path / "memory").iterdir()).write_bytes(damage)
    assert scan.scan(source, memory).read == 1 and scan.scan(source, memory).read == 0


def test_folder_behind_a_url_reads_like_a_local_one(tmp_path):
    folder = tiny.save_photos(tmp_path / "photos/below", [(40, 30), (50, 20)])
    (folder / "00.txt").write_text("a caption")
    near = scan.scan(Folder(str(tmp_path / "photos")), ScanCache(tmp_path / "a"))
    far = scan.scan(Remote(f"file://{tmp_path}/photos"), ScanCache(tmp_path / "b"))
    assert [(p.name, p.size, p.digest) for p in near.pictures] == [(p.name, p.size, p.digest) for p in far.pictures]
    assert [p.source.text(p.name) for p in far.pictures] == ["a caption", None]
    assert scan.scan(Remote(f"file://{tmp_path}/photos"), ScanCache(tmp_path / "b")).read == 0
