"""Measurements, printed: `pytest -m slow -s tests/data/test_speed.py`. Only what holds on any machine is asserted."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dreambooth_lab import lab
from dreambooth_lab.data.caching import cache
from dreambooth_lab.data.caching.fill import Encoder, Stores, fill_latents
from dreambooth_lab.data.planning import plan
from dreambooth_lab.data.preparation.entry import Collector
from dreambooth_lab.data.sources import decode, scan
from dreambooth_lab.data.sources.folder import Folder
from dreambooth_lab.data.sources.scan import ScanCache
from dreambooth_lab.factory import build_family

pytestmark = pytest.mark.slow


def small_png(number: int) -> bytes:
    """A unique 16 × 16 PNG."""
    body = zlib.compress(b"".join(b"\0" + struct.pack(">Q", number) * 6 for _ in range(16)), 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_scanning_100_000_images(tmp_path, monkeypatch):
    for i in range(100_000):
        folder = tmp_path / "photos" / f"{i // 1000:03d}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{i:06d}.png").write_bytes(small_png(i))
    time.sleep(scan.STABLE_AFTER + 1)
    source_, memory = Folder(str(tmp_path / "photos")), ScanCache(tmp_path / "memory")
    started = time.perf_counter(), time.process_time()
    cold = scan.scan(source_, memory)
    between = time.perf_counter(), time.process_time()
    monkeypatch.setattr(Folder, "read", lambda *a: pytest.fail("an image was read"))
    warm = scan.scan(source_, memory)
    ended = time.perf_counter(), time.process_time()
    assert (cold.read, warm.read, len(warm.pictures)) == (100_000, 0, 100_000) and warm.pictures == cold.pictures
    first, second = ([b - a for a, b in zip(x, y, strict=True)] for x, y in ((started, between), (between, ended)))
    print(f"\nfirst scan {first[0]:.1f} s ({first[1]:.1f} s of CPU), warm start {second[0]:.1f} s ({second[1]:.1f} s of CPU)")
    assert second[1] < first[1]


def photo(path, seed: int) -> None:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((1500, 1000), Image.Resampling.BICUBIC).save(path, quality=92)


def test_cache_build_time_against_a_plain_loop(small, tmp_path):
    """Scan, hash, decode, resize, encode, checksum, write; against decode, resize, encode of the same images. Interleaved."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        photo(folder / f"{i}.jpg", i)
    words = [w for w in small if not w.startswith(("dataset.path", "cache", "prior"))]
    cfg = lab.compose(*words, f"dataset.path={folder}", "dataset.resolutions=[256]")
    family = build_family(cfg)
    encoder = Encoder(family, family.image_identity())
    times: dict[str, list[float]] = {"bare": [], "ours": []}
    for turn in range(4):
        started = time.perf_counter()
        for path in sorted(folder.iterdir()):
            image = Image.open(path).convert("RGB")
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            resized = torch.nn.functional.interpolate(pixels, (208, 312), mode="bicubic", antialias=True)[..., :208, :304]
            family.encode_image(resized.float() / 127.5 - 1)
        between = time.perf_counter()
        stores = Stores(tmp_path / f"cache{turn}")
        entries = Collector(family.stride, stores.root).collect(plan(cfg).specs).entries
        made = list(fill_latents(stores, entries, encoder, False))
        ended = time.perf_counter()
        assert len(made) == 24
        if turn:  # the first is a warm-up
            times["bare"].append(between - started)
            times["ours"].append(ended - between)
    ratios = [bare / ours for bare, ours in zip(times["bare"], times["ours"], strict=True)]
    rates = [24 / min(times[name]) for name in ("ours", "bare")]
    print(f"\n{rates[0]:.1f} images/s, {rates[1]:.1f} bare; ratios {', '.join(f'{r:.2f}' for r in ratios)}")
    assert sorted(ratios)[1] > 0.5


class Shards:
    """The alternative to one file per entry: safetensors files of many entries with an index by key. Only measured."""

    SIZE = 64

    def __init__(self, folder):
        self.folder, self.index, self.waiting = folder, {}, {}
        folder.mkdir()

    def write(self, key, tensors):
        self.waiting[key] = tensors
        if len(self.waiting) == self.SIZE:
            self.flush()

    def flush(self):
        path = self.folder / f"{len(self.index):06d}.safetensors"
        sums = {key: cache._checksum(tensors) for key, tensors in self.waiting.items()}
        flat = {f"{key}.{name}": tensor for key, tensors in self.waiting.items() for name, tensor in tensors.items()}
        save_file(flat, path.with_suffix(".part"), metadata=sums)
        path.with_suffix(".part").replace(path)
        self.index |= {key: (path, sums[key]) for key in self.waiting}
        self.waiting = {}

    @lru_cache  # noqa: B019
    def opened(self, path):
        return safe_open(path, "pt").__enter__()

    def read(self, key):
        path, total = self.index[key]
        tensors = {name: self.opened(path).get_tensor(f"{key}.{name}").clone() for name in ("mean", "std")}
        assert cache._checksum(tensors) == total
        return tensors


def timed(work, n: int) -> tuple[float, float]:
    """Microseconds per entry, wall and CPU time; CPU time varies less on a busy machine."""
    started = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - started[0]) / n * 1e6, (time.process_time() - started[1]) / n * 1e6


@pytest.mark.parametrize(("side", "n"), [(128, 384), (64, 1024), (32, 2048)], ids=["1024px", "512px", "256px"])
def test_cache_files_against_shards(tmp_path, side, n):
    """Entries of a mean and a std of 4 × side × side, float32: writing, a start, reading in order, reading at random."""
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(n)]
    values = {key: {"mean": torch.randn(4, side, side), "std": torch.rand(4, side, side)} for key in keys}
    random = [keys[i] for i in np.random.default_rng(0).integers(0, n, n)]
    rows: dict[str, list[tuple[float, float]]] = {}
    for turn in range(3):
        store, shards = cache.Store(tmp_path / f"f{turn}", "latents"), Shards(tmp_path / f"s{turn}")
        for name, write, read in (("files", store.write, store._read), ("shards", shards.write, shards.read)):
            rows.setdefault(f"{name}: write", []).append(timed(lambda w=write: [w(key, values[key]) for key in keys], n))
            if name == "files":
                assert all(store.is_intact(key) for key in keys)
                store.save_index()
                later = cache.Store(tmp_path / f"f{turn}", "latents")
                found = timed(lambda s=later: all(s.is_intact(key) for key in keys), n)
                rows.setdefault("files: found at a start", []).append(found)
            rows.setdefault(f"{name}: read in order", []).append(timed(lambda r=read: [r(key) for key in keys], n))
            rows.setdefault(f"{name}: read at random", []).append(timed(lambda r=read: [r(key) for key in random], n))
    print(f"\n{side * side * 32 / 1000:.0f} kB an entry, {n} entries, medians of 3, µs an entry (wall, CPU):")
    for name, found in rows.items():
        print(f"  {name:24s} {sorted(w for w, _ in found)[1]:7.0f} {sorted(c for _, c in found)[1]:7.0f}")


def test_png_size_is_read_without_decoding():
    data = io.BytesIO()
    Image.new("RGB", (3000, 2000)).save(data, "PNG")
    started = time.process_time()
    decode.head(data.getvalue())
    assert time.process_time() - started < 0.05
