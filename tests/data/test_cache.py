import subprocess
import sys

import pytest
import torch

from dreambooth_lab.data.cache import Store, key

VALUE = {"mean": torch.arange(12.0).view(3, 4), "std": torch.ones(3, 4)}


def test_what_is_written_is_read(tmp_path):
    store = Store(tmp_path, "latents")
    assert not store.intact("ab12")
    store.write("ab12", VALUE)
    assert store.intact("ab12")
    assert all(torch.equal(VALUE[name], tensor) for name, tensor in store.read("ab12").items())
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "garbage"])
def test_damage_is_noticed_counted_and_healed(tmp_path, damage):
    store = Store(tmp_path, "latents")
    store.write("ab12", VALUE)
    path = store._path("ab12")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes({"truncate": data[:-5], "flip": data, "empty": b"", "garbage": b"\xff" * 40}[damage])
    fresh = Store(tmp_path, "latents")
    assert not fresh.intact("ab12") and fresh.damaged == 1 and not path.exists()
    fresh.write("ab12", VALUE)
    assert fresh.intact("ab12")


def test_different_parts_have_different_keys():
    keys = [key("a", "bc"), key("ab", "c"), key("abc"), key("a", "bc", ""), key("bc", "a")]
    assert len(set(keys)) == len(keys)


def test_two_processes_build_one_cache(tmp_path):
    code = (
        "import torch, sys; from pathlib import Path; from dreambooth_lab.data.cache import Store\n"
        "s = Store(Path(sys.argv[1]), 'latents')\n"
        "[s.write(f'aa{i % 5}', {'x': torch.full((50_000,), float(i % 5))}) for i in range(60)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    store = Store(tmp_path, "latents")
    assert all(store.intact(f"aa{i}") and (store.read(f"aa{i}")["x"] == i).all() for i in range(5))
