"""Metrics of a run with the embedded model: `python -m dreambooth_lab.tools.judge_toybox RUN [RUN …]`.

Scores the run's validation images, those of the base model (step 0) and the last ones, with the shipped evaluator and scorer:

    class, place   share of images that show the class and the place of their prompt
    home           share of images that show a place of the subject's photos
    leak           position of an image's left and right edges, where the subject rarely is, between the base model's (0,
                   same noise) and the photos' (1): leak of their backgrounds
    identity       mean cosine of the evaluator's identity features with the subject's photos: up with the rare token, and
                   unchanged elsewhere, is the goal of DreamBooth
    gallery        mean average precision of finding the subject's photos among 24 look-alikes, with an image as the query, by the
                   evaluator's head for individuals: 1 for this individual, about .5 for a look-alike, .2 for any other
    CLIP-I         the same with the shipped scorer's image features
    diversity      1 - mean cosine of those features between the images of one prompt: falls when a class collapses

With `--steps N` images are generated again from the run's export and from the base model, with N sampler steps and the run's own
seeds and guidance, and written to RUN/sampled_N. The metrics are written to RUN/toybox.json or RUN/toybox_N.json.

With `--log` the means over the subject's prompts and over the class's are also added to the run's metrics.csv, where
`tools.compare` finds them: subject/evaluator (identity), subject/gallery_evaluator, class/pres_evaluator (identity).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dreambooth_lab.callbacks.image_grids import save
from dreambooth_lab.callbacks.retrieval import average_precision
from dreambooth_lab.config import ConfigError, Subject
from dreambooth_lab.factory import build_family
from dreambooth_lab.lab import Run, load
from dreambooth_lab.models.feature_extractors import Clip
from dreambooth_lab.names import of_score
from dreambooth_lab.runfolder import METRICS_HEADER
from dreambooth_lab.storage import durable
from dreambooth_lab.tools.common import cli
from dreambooth_lab.toybox import base_folder
from dreambooth_lab.toybox.evaluator import Evaluator
from dreambooth_lab.toybox.shapes import CLASSES
from dreambooth_lab.toybox.subjects import LOOK_ALIKES, look_alike_pictures
from dreambooth_lab.toybox.world import BACKGROUNDS, SUBJECTS

EDGE = 16  # px of 128 at the left and the right that are considered background

Pictures = Sequence[Image.Image]


class Scores(NamedTuple):
    """Metrics of one prompt's images at one step; None if the prompt, or for `gallery` the subject, does not determine it."""

    kind: float | None
    place: float | None
    home: float
    leak: float
    identity: float
    gallery: float | None
    clip_i: float
    diversity: float


class Judge:
    """The evaluator and scorer that ship with the embedded model."""

    def __init__(self) -> None:
        self.evaluator = Evaluator.load(base_folder() / "evaluator")
        self.look_alikes: dict[str, Tensor] = {}  # subject → embeddings
        self.clip = Clip(str(base_folder() / "scorer"), "the embedded scorer", torch.device("cpu"), batch_size=64)

    def score(self, prompt: str, pictures: Pictures, before: Pictures, photos: Pictures, subject: str | None = None) -> Scores:
        """
        Args:
            before: the base model's images.
            photos: the subject's.
            subject: its name in the toy world, for its look-alikes.
        """
        seen, homes = self.evaluator.judge(_tensor(pictures)), set(self.evaluator.judge(_tensor(photos)).background)
        kind = next((k for k in CLASSES if k in prompt.split()), None)
        place = next((b for b in BACKGROUNDS if b in prompt), None)
        features, of_photos = self.clip.embed(pictures), self.clip.embed(photos)
        alike = features @ features.T
        n = len(pictures)
        return Scores(
            kind=float(np.mean([k == kind for k in seen.kind])) if kind else None,
            place=float(np.mean([b == place for b in seen.background])) if place else None,
            home=float(np.mean([b in homes for b in seen.background])),
            leak=float(leak(_edges(pictures), _edges(before), _edges(photos)).mean()),
            identity=float(self.evaluator.similarity(_tensor(pictures), _tensor(photos)).mean()),
            gallery=self._gallery(pictures, photos, subject) if subject in SUBJECTS else None,
            clip_i=float((features @ of_photos.T).mean()),
            diversity=1 - float((alike.sum() - n) / max(n * (n - 1), 1)),
        )

    def _gallery(self, pictures: Pictures, photos: Pictures, subject: str) -> float:
        queries, right = (self.evaluator.individuals(_tensor(each)) for each in (pictures, photos))
        return float(average_precision(queries, right, self._look_alikes(subject)).mean())

    def _look_alikes(self, subject: str) -> Tensor:
        if subject not in self.look_alikes:
            drawn = [picture.image for picture in look_alike_pictures(subject, LOOK_ALIKES)]
            self.look_alikes[subject] = self.evaluator.individuals(_tensor(drawn))
        return self.look_alikes[subject]


def leak(edges: Tensor, before: Tensor, photos: Tensor) -> Tensor:
    """The position of each image on the line from its `before` (0) to the photos' mean (1) [B]: ⟨y - b, p - b⟩ / ‖p - b‖².

    Args:
        edges, before: [B D].
        photos: [N D].
    """
    way = photos.mean(0) - before
    return ((edges - before) * way).sum(1) / way.square().sum(1)


def _tensor(pictures: Pictures) -> Tensor:
    arrays = [np.asarray(p.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _edges(pictures: Pictures) -> Tensor:
    """The left and right edges [B D]."""
    whole = _tensor(pictures)
    return torch.cat([whole[..., :EDGE], whole[..., -EDGE:]], -1).flatten(1)


def saved_images(run: Run) -> dict[int, list[Pictures]]:
    """Step (0 and the last) → a row of validation images for each prompt."""
    steps, prompts = sorted(run.images), range(len(run.config.validation.prompts))
    folders = {step: run.images[step].with_suffix("") for step in (steps[0], steps[-1])}
    return {s: [[Image.open(path) for path in sorted(f.glob(f"{i:02d}_*.png"))] for i in prompts] for s, f in folders.items()}


def generated_images(run: Run, num_steps: int, bases: dict[str, list[Pictures]]) -> dict[int, list[Pictures]]:
    """The same, generated with another number of sampler steps; the base model's are shared by runs with the same settings."""
    asked = OmegaConf.to_yaml(run.config.validation, resolve=True) + run.config.model.pretrained
    if asked not in bases:
        family = build_family(run.config)
        bases[asked] = _draw(run, family.pipeline().to(family.device), num_steps)
    rows = {0: bases[asked], run.steps: _draw(run, run.pipeline(), num_steps)}
    for step, made in rows.items():
        save(run.folder.root / f"sampled_{num_steps}", step, made)
    return rows


def _draw(run: Run, pipeline: Any, num_steps: int) -> list[Pictures]:
    cfg = run.config.validation
    pipeline.set_progress_bar_config(disable=True)
    noise = [[torch.Generator().manual_seed(cfg.seed + i) for i in range(cfg.num_images)] for _ in cfg.prompts]
    return [
        pipeline(
            prompt, negative_prompt=cfg.negative_prompt or None, height=cfg.resolution, width=cfg.resolution, generator=seeds,
            num_images_per_prompt=cfg.num_images, num_inference_steps=num_steps, guidance_scale=cfg.guidance_scale,
        ).images
        for prompt, seeds in track([*zip(cfg.prompts, noise, strict=True)], "drawing")
    ]  # fmt: skip


def judge(run: Run, judge: Judge, pictures: dict[int, list[Pictures]]) -> list[dict[str, Any]]:
    """One record per prompt and step (0 and the last)."""
    photos = [Image.open(path) for path in sorted(Path(run.config.dataset.path).glob("*.png"))]
    before, subject = pictures[min(pictures)], run.config.dataset.get("subject")
    return [
        {"step": step, "prompt": prompt} | judge.score(prompt, rows[i], before[i], photos, subject)._asdict()
        for step, rows in sorted(pictures.items())
        for i, prompt in enumerate(run.config.validation.prompts)
    ]


def log(run: Run, records: list[dict[str, Any]]) -> None:
    """Add the means over the subject's prompts and over the class's to metrics.csv, in place of earlier ones."""
    cfg = run.config
    about = Subject(cfg.dataset.instance_prompt, cfg.dataset.class_prompt, cfg.adapter.token)
    found: dict[tuple[int, str], list[float]] = {}
    for record in records:
        for name, metric in _logged(about, record["prompt"]).items():
            if record[metric] is not None:
                found.setdefault((record["step"], name), []).append(record[metric])
    names = {name for _, name in found}
    lines = [line for line in run.folder.read_metrics() if line[1] not in names]
    lines += [(step, name, fmean(values)) for (step, name), values in found.items()]
    text = io.StringIO()
    csv.writer(text).writerows([METRICS_HEADER, *((step, name, repr(value)) for step, name, value in lines)])
    durable.write_text(run.folder.metrics, text.getvalue())


def _logged(about: Subject, prompt: str) -> dict[str, str]:
    """Logged name → metric, of a prompt's images."""
    if about.is_subject(prompt):
        return {of_score("evaluator"): "identity", of_score("gallery_evaluator"): "gallery"}
    return {of_score("pres_evaluator"): "identity"} if about.is_class(prompt) else {}


def show(run: Run, records: list[dict[str, Any]]) -> None:
    table = Table(title=f"{run.folder.root}: base model → step {records[-1]['step']}", title_justify="left")
    for column in ("prompt", *Scores._fields):
        table.add_column(column)
    half = len(records) // 2
    for before, after in zip(records[:half], records[half:], strict=True):
        table.add_row(before["prompt"], *(_pair(before[name], after[name]) for name in Scores._fields))
    Console(width=150).print(table)


def _pair(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"{before:.2f} → {after:.2f}"


application = cli.app()


@application.command(help=cli.text(__doc__))
def main(
    runs: Annotated[list[Path], typer.Argument(help="runs' folders", metavar="RUN …")],
    logged: Annotated[bool, typer.Option("--log", help="add the means to metrics.csv")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="generate the images again with this many sampler steps")] = None,
) -> None:
    asked = [load(root) for root in runs]
    if without := [str(run.folder.root) for run in asked if not steps and not run.images]:
        raise ConfigError(f"{', '.join(without)}: no validation images; generate them with --steps N")
    if logged and steps:
        raise ConfigError(
            f"--log adds metrics of the validation images, and --steps {steps} generates others; use one of the two"
        )
    judging, bases = Judge(), dict[str, list[Pictures]]()
    for run in asked:
        records = judge(run, judging, generated_images(run, steps, bases) if steps else saved_images(run))
        name = f"toybox_{steps}.json" if steps else "toybox.json"
        (run.folder.root / name).write_text(json.dumps(records, indent=1) + "\n")
        if logged:
            log(run, records)
        show(run, records)


if __name__ == "__main__":
    cli.run(application)
