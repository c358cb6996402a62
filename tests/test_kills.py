"""Runs that are killed at random times and restarted by the same command are bit-identical to an undisturbed run.

The kills fall into caching, class images, bank, training, evaluations, checkpoints, exports and report. `make slow` kills in all
configurations, the suite in one.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from commands import assert_same, call, start
from dreambooth_lab.runfolder import RunFolder
from test_cli import BANK, ROLLOUT

BEST = ["checkpoint.monitor=eval/loss", "eval.every_n_steps=2", "eval.timesteps=2"]
CONFIGURATIONS = {
    "plain": [],
    "best export, average beside it": [*BEST, "ema.validation=comparison"],
    "accumulation, cosine, dropout": ["trainer.accumulate_grad_batches=3", "optimizer.schedule=cosine", "adapter.dropout=0.3"],
    "rollout": ROLLOUT,
    "bank of generated images": BANK,
    "DoRA": ["adapter=dora"],
    "blank, DCO": ["prior.source=blank", "prior.path=null", "objective.anchor=dco"],
    "weights": ["prior=weights", "prior.path=null"],
    "T-LoRA": ["adapter.rank_schedule=tlora", "+adapter.options.init=ortho_tail", "model.gradient_checkpointing=true"],
    "LoKr on int8": ["adapter=lokr", "quant=int8"],
    "full": ["adapter=full", "adapter.rank=1", "optimizer.lr=1e-4"],
    "text encoders and token": ["adapter.text_encoders=[1,2]", "adapter.train_token=true", "adapter.token=z"],
    "two resolutions, flips, captions as class": ["dataset.resolutions=[64,96]", "dataset.flip=true", "prior.source=captions",
                                                  "prior.path=null"],
    "adafactor, no prior": ["optimizer=adafactor", "prior=none"],
}  # fmt: skip
KILLS = 5  # in each configuration


def words(small: list[str], name: str, held_out: Path, cache: Path) -> list[str]:
    more = [word.replace("sks", "z") for word in CONFIGURATIONS[name]]
    own = [word.replace("sks", "z") for word in small if not word.startswith("cache=")]
    return [
        *own, "trainer.max_steps=12", "checkpoint.every_n_steps=2", "validation.every_n_steps=4", f"eval.path={held_out}",
        *more, f"cache={cache}", "resume=auto",
    ]  # fmt: skip


def started_and_killed(command: list[str], cwd: Path, after: float) -> bool:
    """Whether the kill came before the run's end."""
    process = start(*command, cwd=cwd)
    try:
        _, errors = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    assert process.returncode == 0, errors[-3000:]
    return False


def same_end(ours: RunFolder, theirs: RunFolder) -> None:
    assert ours.metrics.read_text() == theirs.metrics.read_text()
    a, b = (torch.load(folder.newest_readable()[0], weights_only=True) for folder in (ours, theirs))
    assert_same(a["state_dict"], b["state_dict"])
    assert_same(a["optimizer_states"][0]["state"], b["optimizer_states"][0]["state"])
    for export in ("export", "export_best"):
        files = sorted(path.relative_to(theirs.root) for path in (theirs.root / export).rglob("*.safetensors"))
        assert files == sorted(path.relative_to(ours.root) for path in (ours.root / export).rglob("*.safetensors"))
        for file in files:
            assert_same(load_file(ours.root / file), load_file(theirs.root / file))
    left = [path for path in ours.root.rglob("*") if path.name.endswith((".part", ".old", ".new"))]
    assert not left and ours.report.is_file()


def kill_and_compare(name: str, small: list[str], tmp_path: Path, kills: int, seed: int) -> int:
    """Kill runs until `kills` of them came before a run's end; compare every finished run. Returns how many were compared."""
    held_out = tiny.save_photos(tmp_path / "held", [(80, 80)], seed=7)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    begin = time.monotonic()
    done = call(*words(small, name, held_out, tmp_path / "cache_whole"), cwd=whole)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr[-3000:]
    (theirs,) = whole.glob("runs/*")
    command, moments = words(small, name, held_out, tmp_path / "cache_broken"), random.Random(seed)
    hits = ends = 0
    while hits < kills:
        if started_and_killed(command, broken, moments.uniform(0.02, 1.0) * seconds):
            hits += 1
        else:
            ends += compare_and_remove(broken, RunFolder(theirs))
    last = call(*command, cwd=broken)
    assert last.returncode == 0 and "Traceback" not in last.stderr, last.stderr[-3000:]
    return ends + compare_and_remove(broken, RunFolder(theirs))


def compare_and_remove(cwd: Path, theirs: RunFolder) -> int:
    (ours,) = cwd.glob("runs/*")
    same_end(RunFolder(ours), theirs)
    shutil.rmtree(ours)
    return 1


def test_run_survives_kills(small, tmp_path):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    kill_and_compare("best export, average beside it", small, tmp_path, 3, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_survives_kills(name, small, tmp_path, capsys):
    seed = random.randrange(2**32)
    ends = kill_and_compare(name, small, tmp_path, KILLS, seed)
    with capsys.disabled():
        print(f"\n{name}: {KILLS} kills (seed {seed}), {ends} runs that ended, all with the same bits")
