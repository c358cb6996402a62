"""What a run on the embedded model learned, in numbers: `python -m dreambooth_lab.tools.judge_toybox RUN [RUN …]`.

Looks at the run's validation pictures, the base model's (step 0) beside the last, with the shipped evaluator and scorer:

    class, place   share of pictures that show the class and the place their prompt names
    identity       mean cosine to the subject's photos of the evaluator's who-is-it features: up under the rare token, and
                   unchanged elsewhere, is what DreamBooth is for
    CLIP-I         the same with the shipped scorer's picture features
    diversity      1 - mean cosine of those features between the pictures of one prompt: falls when a class collapses
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dreambooth_lab.lab import Run, load
from dreambooth_lab.models.judges import Clip
from dreambooth_lab.toybox import base_folder
from dreambooth_lab.toybox.evaluator import Evaluator
from dreambooth_lab.toybox.shapes import CLASSES
from dreambooth_lab.toybox.world import BACKGROUNDS


class Scores(NamedTuple):
    """Of one prompt's pictures at one step; None where the prompt says nothing of it."""

    kind: float | None
    place: float | None
    identity: float
    clip_i: float
    diversity: float


class Judge:
    """The evaluator and scorer that ship with the embedded model."""

    def __init__(self) -> None:
        self.evaluator = Evaluator.load(base_folder() / "evaluator")
        self.clip = Clip(str(base_folder() / "scorer"), "the embedded scorer", torch.device("cpu"), batch_size=64)

    def score(self, prompt: str, pictures: Sequence[Image.Image], photos: Sequence[Image.Image]) -> Scores:
        seen = self.evaluator.judge(_tensor(pictures))
        kind = next((k for k in CLASSES if k in prompt.split()), None)
        place = next((b for b in BACKGROUNDS if b in prompt), None)
        features, of_photos = self.clip.see(pictures), self.clip.see(photos)
        alike = features @ features.T
        n = len(pictures)
        return Scores(
            kind=float(np.mean([k == kind for k in seen.kind])) if kind else None,
            place=float(np.mean([b == place for b in seen.background])) if place else None,
            identity=float(self.evaluator.similarity(_tensor(pictures), _tensor(photos)).mean()),
            clip_i=float((features @ of_photos.T).mean()),
            diversity=1 - float((alike.sum() - n) / max(n * (n - 1), 1)),
        )


def _tensor(pictures: Sequence[Image.Image]) -> Tensor:
    arrays = [np.asarray(p.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def judge(run: Run, judge: Judge) -> list[dict[str, Any]]:
    """One record per prompt and step (0 and the last)."""
    photos = [Image.open(path) for path in sorted(Path(run.config.dataset.path).glob("*.png"))]
    steps = sorted(run.pictures)
    records = []
    for step in (steps[0], steps[-1]):
        folder = run.pictures[step].with_suffix("")
        for i, prompt in enumerate(run.config.validation.prompts):
            pictures = [Image.open(path) for path in sorted(folder.glob(f"{i:02d}_*.png"))]
            records.append({"step": step, "prompt": prompt} | judge.score(prompt, pictures, photos)._asdict())
    return records


def show(run: Run, records: list[dict[str, Any]]) -> None:
    table = Table(title=f"{run.folder.root}: base model → step {records[-1]['step']}", title_justify="left")
    for column in ("prompt", *Scores._fields):
        table.add_column(column)
    half = len(records) // 2
    for before, after in zip(records[:half], records[half:], strict=True):
        table.add_row(before["prompt"], *(_pair(before[name], after[name]) for name in Scores._fields))
    Console(width=130).print(table)


def _pair(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.2f} → {after:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    judging = Judge()
    for root in parser.parse_args().runs:
        run = load(root)
        records = judge(run, judging)
        (run.folder.root / "toybox.json").write_text(json.dumps(records, indent=1) + "\n")
        show(run, records)


if __name__ == "__main__":
    main()
