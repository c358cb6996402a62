import json
import os
import signal
import time

import pytest
import torch

from dreambooth_lab.data.cache_key import key
from dreambooth_lab.data.caching.cache import Damaged, Store
from dreambooth_lab.tools import cache as tool
from processes import ended, fork

VALUE = {"mean": torch.arange(12.0).view(3, 4), "std": torch.ones(3, 4)}


def test_written_entries_are_read_back(tmp_path):
    store = Store(tmp_path, "latents")
    assert not store.is_intact("ab12")
    store.write("ab12", VALUE)
    assert store.is_intact("ab12")
    assert all(torch.equal(VALUE[name], tensor) for name, tensor in store.read("ab12").items())
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "garbage"])
def test_damage_is_detected_counted_and_repaired(tmp_path, damage):
    store = Store(tmp_path, "latents")
    store.write("ab12", VALUE)
    path = store.path("ab12")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes({"truncate": data[:-5], "flip": data, "empty": b"", "garbage": b"\xff" * 40}[damage])
    fresh = Store(tmp_path, "latents")
    assert not fresh.is_intact("ab12") and fresh.damaged == 1 and not path.exists()
    fresh.write("ab12", VALUE)
    assert fresh.is_intact("ab12")


def test_different_parts_have_different_keys():
    keys = [key("a", "bc"), key("ab", "c"), key("abc"), key("a", "bc", ""), key("bc", "a")]
    assert len(set(keys)) == len(keys)


def test_two_processes_write_the_same_entries(tmp_path):
    def write():
        store = Store(tmp_path, "latents")
        for i in range(60):
            store.write(f"aa{i % 5}", {"x": torch.full((50_000,), float(i % 5))})

    running = [fork(write) for _ in range(2)]
    assert [ended(child) for child in running] == [0, 0]
    store = Store(tmp_path, "latents")
    assert all(store.is_intact(f"aa{i}") and (store.read(f"aa{i}")["x"] == i).all() for i in range(5))


def test_verified_entry_is_not_read_again_until_its_file_changes(tmp_path, monkeypatch):
    store = Store(tmp_path, "latents")
    store.write("ab12", VALUE)
    assert store.is_intact("ab12")
    store.save_index()
    later = Store(tmp_path, "latents")
    monkeypatch.setattr(later, "_read", lambda key: pytest.fail("an entry was read"))
    assert later.is_intact("ab12")
    data = bytearray(store.path("ab12").read_bytes())
    data[-3] ^= 1
    store.path("ab12").write_bytes(data)
    os.utime(store.path("ab12"), ns=(0, 0))  # times of content can be set by hand
    changed = Store(tmp_path, "latents")
    assert not changed.is_intact("ab12") and changed.damaged == 1


def test_every_read_verifies_its_data(tmp_path):
    store = Store(tmp_path, "latents")
    store.write("ab12", VALUE)
    data = bytearray(store.path("ab12").read_bytes())
    data[-3] ^= 1
    store.path("ab12").write_bytes(data)
    for missing in ("ab12", "cd34"):
        with pytest.raises(Damaged):
            store.read(missing)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 1}', "{", '{"ab12": ["x", "y"]}'])
def test_damaged_verification_records_cause_a_new_read(tmp_path, text):
    Store(tmp_path, "latents").write("ab12", VALUE)
    (tmp_path / "latents/seals.json").write_text(text)
    store = Store(tmp_path, "latents")
    assert store.is_intact("ab12")
    store.save_index()
    assert "ab12" in json.loads((tmp_path / "latents/seals.json").read_text())


def test_killed_writer_leaves_only_complete_entries(tmp_path):
    def write():
        store = Store(tmp_path, "latents")
        for i in range(10**6):
            store.write(f"{i % 256:02x}{i}", {"x": torch.full((200_000,), float(i))})

    child, store = fork(write), Store(tmp_path, "latents")
    deadline = time.monotonic() + 120
    while len(list(store.keys())) < 12:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    keys = list(store.keys())
    assert len(keys) >= 12 and all(store.is_intact(key) for key in keys) and store.damaged == 0


def call(words):
    with pytest.raises(SystemExit) as ended:
        tool.main(words)
    return ended.value.code


def test_tool_counts_verifies_and_prunes(tmp_path, capsys):
    store = Store(tmp_path, "latents")
    for i in range(4):
        store.write(f"aa{i}", VALUE)
    store.path("aa0").write_bytes(b"x")
    assert call(["stats", str(tmp_path)]) == 0 and "4" in capsys.readouterr().out
    assert call(["verify", str(tmp_path), "--dry-run"]) == 1 and store.path("aa0").exists()
    assert call(["verify", str(tmp_path)]) == 1 and not store.path("aa0").exists()
    assert call(["verify", str(tmp_path)]) == 0
    old = store.path("aa1")
    os.utime(old, (0, 0))
    left = old.parent / "x.part"
    left.touch()
    os.utime(left, (0, 0))
    assert call(["prune", str(tmp_path), "--unused_days", "30", "--dry_run"]) == 0 and old.exists()
    assert call(["prune", str(tmp_path), "--unused-days", "30"]) == 0
    assert list(store.keys()) == ["aa2", "aa3"] and not left.exists()
    assert call(["prune", str(tmp_path), "--max-gb", "0"]) == 0 and not list(store.keys())
    assert call(["stats", str(tmp_path / "none")]) == 2 and call(["prune", str(tmp_path)]) == 2


def test_new_entry_mode_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        store = Store(tmp_path, "text")
        store.write("ab", {"x": torch.zeros(2)})
        assert store.is_intact("ab")
        store.save_index()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2 and all(path.stat().st_mode & 0o777 == 0o640 for path in files)
