"""Scores of the validation images: CLIP score, the DreamBooth paper's metrics (Ruiz et al. 2023, §4.2, §5.3), diversity.

Cosine similarities on a 0–1 scale. Each is also written per image to scores.csv, so that changes from step 0 can be
compared image by image (same prompt, same noise).

    clip/mean …        CLIP-T: each image with its own prompt; mean, min, max, std over all images
    subject/…          images of prompts with the rare word, with the mean of the subject's photos: clip_i, dino, dino_masked
    subject/gallery_…  the same prompts: mean average precision of finding the photos among look-alikes (`eval.gallery`)
    class/pres_…       the same for prompts of the class without the rare word: how far the class has become the subject
    class/diversity_…  1 - mean cosine among the embeddings of the images of one such prompt: falls when the class collapses

Diversity is not the paper's DIV, which is the mean LPIPS distance among images of one subject and prompt, on another scale:
LPIPS needs a network's weights, and none of the libraries used here loads them from a folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import fmean, pstdev, stdev
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from .. import names
from ..config import Subject
from ..models.feature_extractors import Clip, FeatureExtractor, MaskedDino, Photo
from ..runfolder import RunFolder
from . import retrieval
from .csv_log import CsvLog

log = logging.getLogger(__name__)


class Score(NamedTuple):
    step: int
    weights: str  # live or ema
    metric: str
    prompt: str
    image: int
    value: float


class Scores:
    """Scores one step's images.

    Args:
        clip: for the scores with prompts; None omits them.
        extractors: name → feature extractor for comparing images with the photos.
        photos: the subject's.
        subject: classifies validation prompts as being about the subject or its class.
        look_alikes: name of an extractor → embeddings of the gallery's look-alikes [W D].
    """

    def __init__(
        self, folder: RunFolder, clip: Clip | None, extractors: Mapping[str, FeatureExtractor | MaskedDino],
        photos: Sequence[Photo],
        subject: Subject, look_alikes: Mapping[str, Tensor] | None = None,
    ):  # fmt: skip
        self.table, self.clip, self.extractors = CsvLog(folder.scores, Score), clip, extractors
        self.photos = {name: extractor.embed_photos(photos) for name, extractor in extractors.items()}
        self.subject, self.look_alikes = subject, look_alikes or {}
        for name, wrong in self.look_alikes.items():
            if (best := retrieval.of_photos(self.photos[name], wrong)) is not None:
                log.info("%s%s of the subject's own photos, each among the others: %.3f", retrieval.PREFIX, name, best)
        if not subject.rare:
            message = "only validation prompts that contain the whole instance prompt are scored as the subject"
            log.warning("the rare word can't be identified, so %s; set adapter.token to it, or dataset.class_prompt", message)

    def __call__(self, prompts: Sequence[str], rows: Sequence[Sequence[Image.Image]]) -> list[Score]:
        """Score images, one row per prompt; the caller fills in the weights."""
        with ExitStack() as there:
            for extractor in self.extractors.values():
                there.enter_context(extractor.on_device())
            return [score for prompt, row in zip(prompts, rows, strict=True) for score in self._score(prompt, row)]

    def _score(self, prompt: str, row: Sequence[Image.Image]) -> Iterator[Score]:
        seen = {name: extractor.embed(row) for name, extractor in self.extractors.items()}
        if self.clip:
            fits = (seen["clip_i"] @ self.clip.embed_texts([prompt]).T)[:, 0]
            yield from _scores("clip_t", prompt, fits.tolist())
        for name, vectors in seen.items():
            alike = (vectors @ self.photos[name].T).mean(1).tolist()
            if self.subject.is_subject(prompt):
                yield from _scores(name, prompt, alike)
                if name in self.look_alikes:
                    found = retrieval.average_precision(vectors, self.photos[name], self.look_alikes[name])
                    yield from _scores(f"{retrieval.PREFIX}{name}", prompt, found.tolist())
            elif self.subject.is_class(prompt):
                yield from _scores(f"pres_{name}", prompt, alike)
                yield from _scores(f"diversity_{name}", prompt, _apart(vectors))


def _scores(metric: str, prompt: str, values: Sequence[float]) -> Iterator[Score]:
    return (Score(0, "", metric, prompt, i, value) for i, value in enumerate(values))


def _apart(vectors: Tensor) -> list[float]:
    """1 - mean cosine of each row with the others [N]; empty for a single row."""
    n = len(vectors)
    return (1 - ((vectors @ vectors.T).sum(1) - 1) / (n - 1)).tolist() if n > 1 else []


def read_scores(folder: RunFolder) -> list[Score]:
    return CsvLog(folder.scores, Score).read()


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """Means by metric, with the logged names."""
    values: dict[str, list[float]] = {}
    for score in scores:
        values.setdefault(score.metric, []).append(score.value)
    numbers: dict[str, float] = {}
    for metric, found in values.items():
        if metric == "clip_t":
            numbers |= {"clip/mean": fmean(found), "clip/min": min(found), "clip/max": max(found), "clip/std": pstdev(found)}
        else:
            numbers[names.of_score(metric)] = fmean(found)
    return numbers


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
        weights: of the images: live or ema.
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
    """95 % interval of the mean, by Student's t; NaN for fewer than three values."""
    n = len(values)
    if n < 3:
        return float("nan"), float("nan")
    from scipy import stats  # takes half a second, so only if needed

    half = float(stats.t.ppf(0.975, n - 1)) * stdev(values) / n**0.5
    return fmean(values) - half, fmean(values) + half
