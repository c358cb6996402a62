"""What the validation pictures are worth: CLIP score and the DreamBooth paper's metrics (Ruiz et al. 2023, §4.2, §5.3).

Cosine similarities on a 0–1 scale, every one also kept per picture in scores.csv, so that changes against step 0 can be
compared picture by picture (same prompt, same noise).

    clip/mean …    CLIP-T: each picture with its own prompt; mean, min, max, std over all pictures
    subject/…      pictures of prompts with the rare word, each with the mean of the subject's photos: clip_i, dino, dino_masked
    class/pres_…   the same for prompts of the class without the rare word: how far the class has become the subject
    class/div_…    1 - mean similarity among the pictures of one such prompt: falls when the class collapses
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist, fmean, pstdev, stdev
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..config import words
from ..models.judges import Clip, Judge, MaskedDino, Photo
from ..runfolder import RunFolder
from .ledger import Ledger


class Score(NamedTuple):
    step: int
    weights: str  # live or ema
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
        self, folder: RunFolder, clip: Clip | None, judges: Mapping[str, Judge | MaskedDino], photos: Sequence[Photo],
        instance_prompt: str, class_prompt: str | None,
    ):  # fmt: skip
        self.ledger, self.clip, self.judges = Ledger(folder.scores, Score), clip, judges
        self.photos = {name: judge.see_photos(photos) for name, judge in judges.items()}
        self.rare = set(words(instance_prompt)) - set(words(class_prompt or "")) - {"a", "an", "the"}
        self.noun = words(class_prompt)[-1] if class_prompt else None

    def __call__(self, prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> list[Score]:
        """Score pictures, a row a prompt; whose they are is for the caller to fill in."""
        return [score for prompt, row in zip(prompts, rows, strict=True) for score in self._score(prompt, row)]

    def _score(self, prompt: str, row: Sequence[Image.Image]) -> Iterator[Score]:
        seen = {name: judge.see(row) for name, judge in self.judges.items()}
        if self.clip:
            fits = (seen["clip_i"] @ self.clip.read([prompt]).T)[:, 0]
            yield from _scores("clip_t", prompt, fits.tolist())
        said = set(words(prompt))
        for name, vectors in seen.items():
            alike = (vectors @ self.photos[name].T).mean(1).tolist()
            if self.rare & said:
                yield from _scores(name, prompt, alike)
            elif self.noun in said:
                yield from _scores(f"pres_{name}", prompt, alike)
                yield from _scores(f"div_{name}", prompt, _apart(vectors))


def _scores(metric: str, prompt: str, values: Sequence[float]) -> Iterator[Score]:
    return (Score(0, "", metric, prompt, i, value) for i, value in enumerate(values))


def _apart(vectors: Tensor) -> list[float]:
    """1 - mean cosine of each row with the others [N]; nothing to compare gives nothing."""
    n = len(vectors)
    return (1 - ((vectors @ vectors.T).sum(1) - 1) / (n - 1)).tolist() if n > 1 else []


def read_scores(folder: RunFolder) -> list[Score]:
    return Ledger(folder.scores, Score).read()


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
    """A metric's mean at the first step and at a later one, and the 95 % interval of the paired differences' mean."""

    metric: str
    first: float
    last: float
    low: float
    high: float


def changes(scores: Sequence[Score], weights: str = "live", step: int | None = None) -> list[Change]:
    """Per metric, paired by prompt and picture: the same noise before and after.

    Args:
        weights: whose pictures: live or ema.
        step: the later one; None: the last.
    """
    mine = [score for score in scores if score.weights == weights]
    steps = sorted({score.step for score in mine})
    if len(steps) < 2:
        return []
    first = {(s.metric, s.prompt, s.image): s.value for s in mine if s.step == steps[0]}
    last = {(s.metric, s.prompt, s.image): s.value for s in mine if s.step == (step or steps[-1])}
    found = []
    for metric in dict.fromkeys(s.metric for s in mine):
        pairs = [(first[key], value) for key, value in last.items() if key[0] == metric]
        if pairs:
            low, high = interval([after - before for before, after in pairs])
            found.append(Change(metric, fmean(a for a, _ in pairs), fmean(b for _, b in pairs), low, high))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean, by Student's t; not a number for fewer than three values."""
    n = len(values)
    if n < 3:
        return float("nan"), float("nan")
    half = _student(n - 1) * stdev(values) / n**0.5
    return fmean(values) - half, fmean(values) + half


def _student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, within 1 % from 3 degrees on (Abramowitz & Stegun 26.7.5)."""
    z, v = NormalDist().inv_cdf(0.975), degrees
    return (
        z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )  # fmt: skip
