"""What the validation pictures are worth: CLIP score and the DreamBooth paper's metrics (Ruiz et al. 2023, §4.2, §5.3).

Cosine similarities on a 0–1 scale, every one also kept per picture in scores.csv, so that changes against step 0 can be
compared picture by picture (same prompt, same noise).

    clip/mean …    CLIP-T: each picture with its own prompt; mean, min, max, std over all pictures
    subject/…      pictures of prompts with the rare word, each with the mean of the subject's photos: clip_i, dino
    class/pres_…   the same for prompts of the class without the rare word: how far the class has become the subject
    class/div_…    1 - mean similarity among the pictures of one such prompt: falls when the class collapses
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from statistics import fmean, pstdev
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..models.judges import Clip, Judge
from ..runfolder import RunFolder

HEADER = ["step", "metric", "prompt", "image", "value"]


class Score(NamedTuple):
    step: int
    metric: str
    prompt: str
    image: int
    value: float


class Scores:
    """Scores one step's pictures.

    Args:
        clip: also scores against prompts; None leaves those out.
        judges: name → network, that compare pictures with the photos.
        photos: the subject's.
        instance_prompt, class_prompt: tell which validation prompts are about the subject, and which about its class.
    """

    def __init__(
        self, folder: RunFolder, clip: Clip | None, judges: dict[str, Judge], photos: Sequence[Image.Image],
        instance_prompt: str, class_prompt: str | None,
    ):  # fmt: skip
        self.folder, self.clip, self.judges = folder, clip, judges
        self.photos = {name: judge.see(photos) for name, judge in judges.items()}
        self.rare = set(instance_prompt.split()) - set((class_prompt or "").split()) - {"a", "an", "the"}
        self.noun = class_prompt.split()[-1] if class_prompt else None

    def __call__(self, step: int, prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> dict[str, float]:
        """Score and keep; returns the means to log."""
        scores = [score for prompt, row in zip(prompts, rows, strict=True) for score in self._score(step, prompt, row)]
        self._keep(step, scores)
        return summary(scores)

    def _score(self, step: int, prompt: str, row: Sequence[Image.Image]) -> Iterator[Score]:
        seen = {name: judge.see(row) for name, judge in self.judges.items()}
        if self.clip:
            fits = (seen["clip_i"] @ self.clip.read([prompt]).T)[:, 0]
            yield from (Score(step, "clip_t", prompt, i, v) for i, v in enumerate(fits.tolist()))
        words = set(prompt.split())
        for name, vectors in seen.items():
            alike = (vectors @ self.photos[name].T).mean(1).tolist()
            if self.rare & words:
                yield from (Score(step, name, prompt, i, v) for i, v in enumerate(alike))
            elif self.noun in words:
                yield from (Score(step, f"pres_{name}", prompt, i, v) for i, v in enumerate(alike))
                yield from (Score(step, f"div_{name}", prompt, i, v) for i, v in enumerate(_apart(vectors)))

    def _keep(self, step: int, scores: list[Score]) -> None:
        """Append to scores.csv; a step that is scored again (after a resume) replaces its older lines."""
        older = [score for score in read_scores(self.folder) if score.step < step]
        with self.folder.scores.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([HEADER, *older, *scores])


def _apart(vectors: Tensor) -> list[float]:
    """1 - mean cosine of each row with the others [N]; nothing to compare gives nothing."""
    n = len(vectors)
    return (1 - ((vectors @ vectors.T).sum(1) - 1) / (n - 1)).tolist() if n > 1 else []


def read_scores(folder: RunFolder) -> list[Score]:
    if not folder.scores.is_file():
        return []
    with folder.scores.open(newline="", encoding="utf-8") as file:
        return [Score(int(s), metric, prompt, int(i), float(v)) for s, metric, prompt, i, v in list(csv.reader(file))[1:]]


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """Means by metric, under the names that are logged."""
    values: dict[str, list[float]] = {}
    for score in scores:
        values.setdefault(score.metric, []).append(score.value)
    logged: dict[str, float] = {}
    for metric, found in values.items():
        if metric == "clip_t":
            logged |= {"clip/mean": fmean(found), "clip/min": min(found), "clip/max": max(found), "clip/std": pstdev(found)}
        else:
            logged[f"{'class' if metric.startswith(('pres', 'div')) else 'subject'}/{metric}"] = fmean(found)
    return logged


class Change(NamedTuple):
    """A metric's mean at the first and at the last step, and the 95 % interval of the paired differences' mean."""

    metric: str
    first: float
    last: float
    low: float
    high: float


def changes(scores: Sequence[Score]) -> list[Change]:
    """Per metric, paired by prompt and picture: the same noise before and after. Normal approximation."""
    steps = sorted({score.step for score in scores})
    if len(steps) < 2:
        return []
    first = {(s.metric, s.prompt, s.image): s.value for s in scores if s.step == steps[0]}
    last = {(s.metric, s.prompt, s.image): s.value for s in scores if s.step == steps[-1]}
    found = []
    for metric in dict.fromkeys(s.metric for s in scores):
        pairs = [(first[key], value) for key, value in last.items() if key[0] == metric]
        apart = [after - before for before, after in pairs]
        half = (
            1.96 * (pstdev(apart) * (len(apart) / (len(apart) - 1)) ** 0.5 / len(apart) ** 0.5)
            if len(apart) > 1
            else float("nan")
        )
        mean = fmean(apart)
        found.append(Change(metric, fmean(a for a, _ in pairs), fmean(b for _, b in pairs), mean - half, mean + half))
    return found
