"""Comparable images of runs: each prompt's image i starts from the same noise in every run with the same `validation.seed`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image

from .. import names
from ..runfolder import RunFolder
from .arms import Arm, Draw, Study
from .runs import Run

HEIGHT = 160  # px of an image on the page
BASE = "base model"
DRAWN = ("validation.seed", "validation.num_inference_steps", "validation.guidance_scale", "validation.resolution",
         "validation.negative_prompt", "model.pretrained")  # fmt: skip


class Strip(NamedTuple):
    """One arm's images of one prompt, from left to right those of noise 0, 1, …"""

    arm: str
    prompt: str
    step: int
    picture: Image.Image


def unlike(study: Study) -> list[str]:
    """Keys in which arms differ and which change images independently of training."""
    return [key for key in study.differing if key in DRAWN]


def strips(study: Study, draw: Draw) -> list[list[Strip]]:
    """Per prompt, in the order of the prompts: the base model's images, once for each wording, and each arm's last images of the
    runs of a draw."""
    runs = [(arm, arm.runs[draw]) for arm in study.arms if draw in arm.runs]
    prompts = max((len(run.values["validation.prompts"]) for _, run in runs), default=0)
    return [row for number in range(prompts) if (row := _row(runs, number))]


def _row(runs: Sequence[tuple[Arm, Run]], number: int) -> list[Strip]:
    made: list[Strip] = []
    for arm, run in runs:
        prompt = run.values["validation.prompts"][number] if number < len(run.values["validation.prompts"]) else None
        steps = sorted(path for path in run.folder.image_folder.glob("step_*/") if any(path.glob(f"{number:02d}_*.png")))
        if prompt is None or not steps:
            continue
        known = any(strip.arm == BASE and strip.prompt == prompt for strip in made)
        for name, folder in ((arm.name, steps[-1]),) if known else ((BASE, steps[0]), (arm.name, steps[-1])):
            step = int(folder.name.removeprefix("step_"))
            made.append(Strip(name, prompt, step, _strip(sorted(folder.glob(f"{number:02d}_*.png")))))
    return made


def _strip(files: Sequence[Path]) -> Image.Image:
    small = [_small(file) for file in files]
    sheet = Image.new("RGB", (sum(image.width + 2 for image in small) - 2, HEIGHT), "white")
    left = 0
    for image in small:
        sheet.paste(image, (left, 0))
        left += image.width + 2
    return sheet


def _small(file: Path) -> Image.Image:
    with Image.open(file) as image:
        size = (round(image.width * HEIGHT / image.height), HEIGHT)
        return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def paired(study: Study) -> dict[tuple[str, str], list[float]]:
    """(metric, arm) → differences from the reference, image by image, of arms that share one seed with it.

    Scores are paired by the index of the prompt and of the image; the eval loss by dataset, image and timestep.
    """
    reference, *others = study.arms
    found: dict[tuple[str, str], list[float]] = {}
    for arm in others:
        shared = reference.runs.keys() & arm.runs.keys()
        if len({draw.seed for draw in shared}) != 1 or unlike(study):
            continue
        for draw in sorted(shared):
            for ours, theirs in zip(*(_rows(one.runs[draw].folder) for one in (arm, reference)), strict=True):
                for metric, group in (ours - theirs).dropna().groupby(level=0):  # pandas pairs them by their index
                    found.setdefault((str(metric), arm.name), []).extend(group)
    return found


def _rows(folder: RunFolder) -> tuple[pd.Series, pd.Series]:
    """The last step's scores and errors of the live weights, indexed for pairing."""
    scores, errors = _none("metric", "prompt", "image"), _none("metric", "dataset", "image", "t")
    if folder.scores.is_file():
        table = _newest(pd.read_csv(folder.scores))
        table["prompt"] = pd.factorize(table["prompt"])[0]
        table["metric"] = [names.of_score(metric) for metric in table["metric"]]
        scores = table.set_index(["metric", "prompt", "image"])["value"]
    if folder.eval.is_file():
        table = _newest(eval_rows(folder)).assign(metric="eval/loss")
        errors = table.set_index(["metric", "dataset", "image", "t"])["loss"]
    return scores, errors


def eval_rows(folder: RunFolder) -> pd.DataFrame:
    """All rows of a run's eval loss."""
    return pd.read_csv(folder.eval).rename(columns={"picture": "image"})  # its former name


def _newest(table: pd.DataFrame) -> pd.DataFrame:
    live = table[table["weights"] == "live"]
    return live[live["step"] == live["step"].max()].copy()


def _none(*names: str) -> pd.Series:
    return pd.Series([], dtype=float, index=pd.MultiIndex.from_arrays([[]] * len(names), names=names))
