"""Images behind URLs, on file systems that need no network."""

import zipfile

import fsspec
import pytest

import samples
import tiny
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.data.planning import plan
from dreambooth_lab.data.sources import scan
from dreambooth_lab.data.sources.folder import Folder
from dreambooth_lab.data.sources.open import open_source
from dreambooth_lab.data.sources.scan import ScanCache
from dreambooth_lab.data.spec import Where
from dreambooth_lab.factory import build_family


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(scan, "STABLE_AFTER", -1.0)


@pytest.fixture
def folder(tmp_path):
    made = tiny.save_photos(tmp_path / "photos/below", [(40, 30), (50, 20)])
    (made / "00.txt").write_text("a caption")
    (made.parent / "broken.jpg").write_bytes(b"not an image")
    return made.parent


def in_memory(folder, name):
    files = fsspec.filesystem("memory")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        files.pipe_file(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://{name}"


def zipped(folder, inner):
    path = folder.parent / "photos.zip"
    with zipfile.ZipFile(path, "w") as file:
        for one in sorted(p for p in folder.rglob("*") if p.is_file()):
            file.write(one, f"{inner}{one.relative_to(folder)}")
    return f"zip://{inner.rstrip('/')}::{path}"


KINDS = {
    "file": lambda folder: f"file://{folder}", "memory": lambda folder: in_memory(folder, "kinds"),
    "a zip": lambda folder: zipped(folder, ""), "a folder in a zip": lambda folder: zipped(folder, "deep/down/"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_folder_behind_a_url_reads_like_a_local_one(folder, tmp_path, kind):
    near = scan.scan(Folder(str(folder)), ScanCache(tmp_path / "a"))
    far = scan.scan(open_source(Where(enums.DatasetType.folder, KINDS[kind](folder)), ""), ScanCache(tmp_path / "b"))
    assert [(p.name, p.size, p.digest) for p in near.pictures] == [(p.name, p.size, p.digest) for p in far.pictures]
    assert [p.source.text(p.name) for p in far.pictures] == ["a caption", None] and far.rejected == near.rejected


def test_only_changed_remote_files_are_read_again(folder, tmp_path):
    source = open_source(Where(enums.DatasetType.folder, in_memory(folder, "changing")), "")
    assert [scan.scan(source, ScanCache(tmp_path / "m")).read for _ in range(2)] == [3, 0]
    fsspec.filesystem("memory").pipe_file("/changing/below/00.png", (folder / "below/01.png").read_bytes())
    again = scan.scan(source, ScanCache(tmp_path / "m"))
    assert again.read == 1 and len({p.digest for p in again.pictures}) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here", "is empty or does not exist"),
        ("gopher://x/y", "can't be opened"),
        ("zip://::/no/such/file.zip", "can't be opened"),
        ("s3a-typo://bucket", "see fsspec's list of protocols"),
    ],
)
def test_url_without_images_is_refused_by_name(tmp_path, url, message):
    with pytest.raises(ConfigError, match=message) as caught:
        scan.scan(open_source(Where(enums.DatasetType.folder, url), ""), ScanCache(tmp_path / "m"))
    assert url in str(caught.value)


def test_photos_masks_and_class_images_can_be_remote(small, photos, class_photos, tmp_path):
    """From configuration keys, and from a dataset file."""
    from PIL import Image

    masks = tmp_path / "masks"
    masks.mkdir()
    for path in photos.iterdir():
        with Image.open(path) as image:
            Image.new("L", image.size, 255).save(masks / path.name)
    urls = [in_memory(place, name) for place, name in ((photos, "p"), (class_photos, "c"), (masks, "m"))]
    words = [w for w in small if not w.startswith(("dataset", "prior", "cache"))] + [f"cache={tmp_path / 'cache'}"]
    own = ["dataset=masked", f"dataset.path={urls[0]}", f"dataset.mask_path={urls[2]}", 'dataset.class_prompt="a dog"']
    own += ["dataset.instance_prompt=a sks dog"]
    file = samples.save(
        tmp_path / "a.json", samples.entry(urls[0], conditioning_data="m"),
        samples.entry(urls[1], id="c", is_regularisation_data=True),
        {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": urls[2]},
    )  # fmt: skip
    for chosen in ([*own, f"prior.path={urls[1]}"], ["dataset=simpletuner", f"dataset.path={file}"]):
        cfg = lab.compose(*words, "prior=teacher", *chosen)
        check(cfg)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        assert sorted((s.spec.is_class, s.found, s.masks) for s in data.summaries()) == [(False, 5, 5), (True, 3, 0)]


def test_bucket_of_a_dataset_file_is_a_url(tmp_path):
    entry = samples.entry(tmp_path, type="aws", aws_bucket_name="b", aws_data_prefix="photos/dog", instance_data_dir=None)
    (made,) = plan(lab.compose("dataset=simpletuner", f"dataset.path={samples.save(tmp_path / 'a.json', entry)}")).specs
    assert made.where.path == "s3://b/photos/dog"


def test_bucket_of_a_local_s3_server_is_read(folder, tmp_path, monkeypatch):
    """Needs `s3fs` and `moto[server]`: listing, reading, time stamps, and the error for a missing bucket."""
    s3fs, server = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y")):
            monkeypatch.setenv(f"AWS_{name}", value)
        files = s3fs.S3FileSystem()
        files.mkdir("dogs")
        files.put(f"{folder}/", "dogs/photos/", recursive=True)
        far = open_source(Where(enums.DatasetType.folder, "s3://dogs/photos"), "")
        scans = [scan.scan(far, ScanCache(tmp_path / "m")) for _ in range(2)]
        near = scan.scan(Folder(str(folder)), ScanCache(tmp_path / "n"))
        assert [s.read for s in scans] == [3, 0] and scans[1].rejected == near.rejected
        assert [(p.name, p.digest) for p in scans[1].pictures] == [(p.name, p.digest) for p in near.pictures]
        assert far.text("below/00.png") == "a caption"
        with pytest.raises(ConfigError, match="s3://nobody/x' can't be listed"):
            scan.scan(open_source(Where(enums.DatasetType.folder, "s3://nobody/x"), ""), ScanCache(tmp_path / "m"))
    finally:
        running.stop()
