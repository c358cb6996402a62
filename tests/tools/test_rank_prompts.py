"""Prompts are ranked by the base model's images from the same noise, and by its loss on the photos."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dreambooth_lab import lab, sheet
from dreambooth_lab.config import ConfigError
from dreambooth_lab.tools.common import base_model
from dreambooth_lab.tools.rank_prompts import application, gathered
from dreambooth_lab.tools.ranking import compared

PROMPTS = ["a photo of a robot", "a photo of a yellow car in the city", "a photo of a cat"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    few = ["validation.num_images=3", "validation.num_inference_steps=4", "trainer.progress=false", "trainer.accelerator=cpu"]
    return ["eval=toybox", *few, f"cache={tmp_path_factory.mktemp('cache')}"]


def call(words: list[str], prompts: list[str], folder: Path, *more: str):
    options = [word for prompt in prompts for word in ("--prompts", prompt)]
    return CliRunner().invoke(application, [*words, *options, "--output_dir", str(folder), *more])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_class_of_the_subject_ranks_first_on_the_toybox(words: list[str], tmp_path: Path) -> None:
    done = call(words, PROMPTS, tmp_path / "out")
    assert done.exit_code == 0, done.output
    ranks = read(tmp_path / "out" / "ranks.csv")
    assert ranks[0]["prompt"] == "a photo of a robot"
    assert {row["metric"] for row in ranks} == {"clip_i", "clip_t", "dino", "dino_masked"}
    means = [float(row["mean"]) for row in ranks if row["metric"] == "clip_i"]
    assert means == sorted(means, reverse=True)
    assert all(float(r["low"]) <= float(r["mean"]) <= float(r["high"]) for r in ranks)
    scores = read(tmp_path / "out" / "scores.csv")
    assert len([s for s in scores if s["metric"] == "clip_i"]) == 3 * 3
    assert len([s for s in scores if s["metric"] == "clip_t"]) == 3 * 5, "one value per photo"
    with Image.open(tmp_path / "out" / "sheet.png") as drawn:
        assert drawn.height == 4 * (128 + sheet.TITLE + sheet.GAP) + sheet.GAP, "the photos once, and one row per prompt"
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 9
    again = call(words, PROMPTS, tmp_path / "out")
    assert isinstance(again.exception, ConfigError) and "--force" in str(again.exception)


def test_every_prompt_starts_from_the_same_noise(words: list[str]) -> None:
    """A prompt's images do not depend on the other prompts."""
    cfg = lab.compose(*words)
    family = base_model.load(cfg)
    alone = base_model.images(cfg, family, [PROMPTS[2]])[0]
    among = base_model.images(cfg, family, [PROMPTS[0], PROMPTS[2]])[1]
    assert [a.tobytes() for a in alone] == [b.tobytes() for b in among]


def test_differences_from_the_best_are_paired() -> None:
    """Values vary much between images, but the prompts differ by a constant: the paired difference is certain."""
    made = compared({"a": [0.1, 0.5, 0.9], "b": [0.2, 0.6, 1.0]})
    assert made["b"].behind == 0 and made["a"].behind == pytest.approx(0.1)
    assert made["a"].behind_high - made["a"].behind_low < 1e-6 < made["a"].high - made["a"].low
    assert math.isnan(compared({"a": [0.1, 0.2]})["a"].low), "two values have no interval"


def test_prediction_changes_only_with_the_prompt(words: list[str]) -> None:
    cfg = lab.compose(*words)
    family = base_model.load(cfg)
    same, near, far = base_model.movement(
        cfg, family, "a photo of a robot", ["a photo of a robot", "a photo of the robot", "a yellow car in the city"]
    ).tolist()
    assert same == 0 and 0 < near < far
    assert torch.isfinite(torch.tensor(far))


def test_invalid_options_are_refused_before_sampling(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--prompts"):
        gathered(["one", " one "], None)
    with pytest.raises(ConfigError, match="--prompts_file"):
        gathered(["one"], tmp_path / "absent.txt")
    (tmp_path / "prompts.txt").write_text("a\n\nb\na\n")
    assert gathered(["c"], tmp_path / "prompts.txt") == ["c", "a", "b"]
    for wrong, named in (
        (["eval=none", *words[1:]], "eval.clip_model"),
        ([*words, "eval.dino_model=null"], "eval.dino_model"),
        ([*words, "dataset.path=/no/such/folder"], "dataset.path"),
        ([*words, "no_such_key=1"], "no_such_key"),
    ):
        failed = call(wrong, PROMPTS, tmp_path / "out", "--by", "dino")
        assert isinstance(failed.exception, ConfigError) and named in str(failed.exception)
    assert not (tmp_path / "out").exists()
