"""Measurements, printed: `pytest -m slow -s tests/data/test_speed.py`. What is asserted is only what must hold anywhere."""

from __future__ import annotations

import hashlib
import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth_lab import lab
from dreambooth_lab.data import cache, scan, source
from dreambooth_lab.data.entry import Collector
from dreambooth_lab.data.fill import Encoder, Stores, fill_latents
from dreambooth_lab.data.folder import Folder
from dreambooth_lab.data.scan import Memory
from dreambooth_lab.data.spec import plan
from dreambooth_lab.run import build_family

pytestmark = pytest.mark.slow


def small_png(number: int) -> bytes:
    """A 16 × 16 PNG unlike any other."""
    body = zlib.compress(b"".join(b"\0" + struct.pack(">Q", number) * 6 for _ in range(16)), 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_scanning_100_000_pictures(tmp_path, monkeypatch):
    for i in range(100_000):
        folder = tmp_path / "photos" / f"{i // 1000:03d}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{i:06d}.png").write_bytes(small_png(i))
    time.sleep(scan.SETTLED + 1)
    source_, memory = Folder(str(tmp_path / "photos")), Memory(tmp_path / "memory")
    started = time.perf_counter(), time.process_time()
    cold = scan.scan(source_, memory)
    between = time.perf_counter(), time.process_time()
    monkeypatch.setattr(Folder, "read", lambda *a: pytest.fail("a picture was read"))
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


def test_building_the_cache_against_a_bare_loop(small, tmp_path):
    """Scan, hash, decode, resize, encode, checksum, write; against decode, resize, encode of the same pictures. Interleaved."""
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
        if turn:  # the first warms everything up
            times["bare"].append(between - started)
            times["ours"].append(ended - between)
    ratios = [bare / ours for bare, ours in zip(times["bare"], times["ours"], strict=True)]
    rates = [24 / min(times[name]) for name in ("ours", "bare")]
    print(f"\n{rates[0]:.1f} pictures/s, {rates[1]:.1f} bare; ratios {', '.join(f'{r:.2f}' for r in ratios)}")
    assert sorted(ratios)[1] > 0.5


def test_one_file_an_entry_costs_little_beside_its_encoding(tmp_path):
    """SDXL-sized entries (mean and std of 4 × 128 × 128, float32): what writing, finding and reading one takes."""
    store, n = cache.Store(tmp_path, "latents"), 400
    values = {"mean": torch.randn(4, 128, 128), "std": torch.rand(4, 128, 128)}
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(n)]
    marks = [time.perf_counter()]
    for key in keys:
        store.write(key, values)
    marks.append(time.perf_counter())
    assert all(store.intact(key) for key in keys)
    marks.append(time.perf_counter())
    store.save_seals()
    later = cache.Store(tmp_path, "latents")
    assert all(later.intact(key) for key in keys)
    marks.append(time.perf_counter())
    for key in keys:
        later._read(key)
    marks.append(time.perf_counter())
    names = ("write", "first check", "sealed check", "read with checksum")
    print("\n" + ", ".join(f"{name} {(b - a) / n * 1e6:.0f} µs" for name, a, b in zip(names, marks, marks[1:], strict=False)))


def test_a_png_is_not_decoded_to_be_measured():
    data = io.BytesIO()
    Image.new("RGB", (3000, 2000)).save(data, "PNG")
    started = time.process_time()
    source.head(data.getvalue())
    assert time.process_time() - started < 0.05
