"""torch.compile of the blocks gives the same losses, for every kind of adapter."""

from __future__ import annotations

import shutil

import pytest

from dreambooth_lab import lab
from dreambooth_lab.run import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler"),
]


@pytest.mark.parametrize(
    "words",
    [
        ["adapter.dropout=0.0", "rollout.enabled=true", "rollout.ramp_steps=0", "rollout.probability=1"],
        ["quant=int8", "model.gradient_checkpointing=true"],
        ["adapter=locon"],
        ["adapter.rank_schedule=tlora", "+adapter.options.init=ortho_tail", "model.gradient_checkpointing=true"],
    ],
    ids=["lora and rollout", "int8 and checkpointing", "locon", "T-LoRA"],
)
def test_compiled_blocks_train_like_eager_blocks(words, small, tmp_path):
    """Three steps with the teacher and validation, on images of two shapes."""
    words = [*small, *words, "trainer.max_steps=3", "optimizer.lr=1e-3"]
    run(lab.compose(*words), tmp_path / "plain")
    run(lab.compose(*words, "model.compile=true"), tmp_path / "compiled")
    plain, compiled = (dict(lab.load(tmp_path / name).series["train/loss"]) for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys() and len(plain) == 3
    for step, loss in plain.items():
        assert compiled[step] == pytest.approx(loss, rel=1e-4)
