"""Files and folders are written completely or not at all."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError
from dreambooth_lab.run import run
from dreambooth_lab.runfolder import RunFolder
from dreambooth_lab.storage import disk, durable


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def write(target: Path, text: str) -> None:
    with durable.atomic_folder(target) as made:
        (made / "a").write_text(text)
        (made / "b").write_text(text)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(8))
def test_folder_is_old_or_new_after_a_kill_at_any_point(at, tmp_path, monkeypatch):
    """A kill before each file operation; `settle` then restores the old or the new folder, and nothing else is left."""
    target, calls = tmp_path / "export", []
    write(target, "old")

    def killing(real):
        def call(*args, **kwargs):
            if len(calls) == at:
                raise Killed
            calls.append(real)
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "write_text", "rename"):
            patch.setattr(Path, name, killing(getattr(Path, name)))
        patch.setattr(durable.shutil, "rmtree", killing(durable.shutil.rmtree))
        with suppress(Killed):
            write(target, "new")
    durable.finish_replacement(target)
    assert contents(target) in ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
    assert names(tmp_path) == ["export"]
    write(target, "newer")
    assert contents(target) == {"a": "newer", "b": "newer"}


def test_leftover_folders_of_earlier_versions_are_settled(tmp_path):
    """As left by versions without `settle`: the old folder beside its place."""
    target = tmp_path / "export_best"
    write(tmp_path / "export_best.old", "old")
    write(target, "new")
    assert contents(target) == {"a": "new", "b": "new"} and names(tmp_path) == ["export_best"]


def test_concurrent_processes_get_separate_folders(tmp_path):
    code = (
        "import sys; from pathlib import Path; from dreambooth_lab.storage import durable;"
        "print(durable.claim(Path(sys.argv[1]) / 'x'))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(6)]
    assert len({process.communicate()[0] for process in started}) == 6


def test_lock_of_a_dead_process_is_released(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dreambooth_lab.storage import durable;"
        "held = durable.lock(Path(sys.argv[1])); print(held is not None, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    assert durable.lock(tmp_path) is None
    process.kill()
    process.wait()
    lock = durable.lock(tmp_path)
    assert lock is not None
    lock.release()


def test_insufficient_disk_space_is_refused_before_training(small, tmp_path, monkeypatch):
    cfg = lab.compose(*small, "validation.resolution=512", "checkpoint.monitor=train/loss")
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 3e5)
    with pytest.raises(ConfigError, match=r"0 MB free, and this run will write about \d+ MB \(3 checkpoints .*images"):
        run(cfg, tmp_path / "run")
    assert names(tmp_path / "run") == [".lock"], "nothing was written"
    cfg.cache = str(tmp_path / "cache")
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 100)
    with pytest.raises(ConfigError, match=r"cache/latents is on a disk with 0 MB free"):
        run(cfg, tmp_path / "run")


def test_estimated_folder_size_is_an_upper_bound(small, tmp_path):
    from dreambooth_lab.data.module import DreamBoothData
    from dreambooth_lab.factory import build_family
    from dreambooth_lab.run import build_module, needed

    cfg = lab.compose(*small, "ema.validation=comparison")
    run(cfg, tmp_path / "run")
    family = build_family(cfg)
    data = DreamBoothData(cfg, family)
    data.prepare()
    estimated = needed(cfg, data, build_module(cfg, family, data, RunFolder(tmp_path / "other")))
    sizes = {
        name: sum(file.stat().st_size for file in (tmp_path / "run" / name).rglob("*") if file.is_file())
        for name in ("checkpoints", "export")
    }
    assert 0.3 * estimated["3 checkpoints"] < sizes["checkpoints"] < 1.5 * estimated["3 checkpoints"]
    assert 0.3 * estimated["exports"] < sizes["export"] < 1.5 * estimated["exports"]


def test_damaged_checkpoints_are_skipped(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in (2, 4, 6, 8):
        torch.save({"step": torch.full((1000,), step)}, folder.checkpoint(step))
    whole = folder.checkpoint(8).read_bytes()
    folder.checkpoint(8).write_bytes(whole[:2000])  # truncated
    flipped = bytearray(folder.checkpoint(6).read_bytes())
    with zipfile.ZipFile(folder.checkpoint(6)) as archive:
        start = next(info for info in archive.infolist() if info.filename.endswith("data/0")).header_offset
    flipped[start + 200] ^= 1  # a bit of the weights
    folder.checkpoint(6).write_bytes(bytes(flipped))
    assert folder.newest_readable() == (folder.checkpoint(4), 4)
    assert [f"step_000000{step}.ckpt is damaged" in caplog.text for step in (8, 6, 4)] == [True, True, False]
