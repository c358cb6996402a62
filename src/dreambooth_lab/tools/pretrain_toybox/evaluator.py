"""The evaluator: attribute heads on every picture, and identity learned from pairs of pictures of one individual.

The head for individuals learns from the same pairs and from pairs of look-alikes, which differ in one to three features.
"""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth_lab.callbacks.retrieval import of_photos
from dreambooth_lab.tools.pretrain_toybox.runner import Stage, fit
from dreambooth_lab.tools.pretrain_toybox.vae import HELD_OUT, to_tensor
from dreambooth_lab.toybox import base_folder
from dreambooth_lab.toybox.evaluator import HEADS, Evaluator
from dreambooth_lab.toybox.shapes import Individual
from dreambooth_lab.toybox.subjects import LOOK_ALIKES, look_alike_pictures, similar, subject_photos
from dreambooth_lab.toybox.world import (
    BACKGROUNDS,
    BUCKETS,
    HELD_OUT_LOOKS,
    SUBJECTS,
    Scene,
    Size,
    draw_individual,
    place,
    render,
    scene,
)  # fmt: skip


class Pairs(NamedTuple):
    images: Tensor  # [2N 3 H W]: picture i and picture N + i show one individual; those from N/2 on are look-alikes of the first
    labels: dict[str, Tensor]  # [2N], -1 where the attribute has no name


def labels(s: Scene) -> dict[str, int]:
    who = s.who
    words = {
        "kind": who.kind, "colour": who.colour, "background": s.background, "style": s.style, "second": who.second,
        "pattern": who.pattern, "variant": str(who.variant), "feature": "yes" if who.feature else "no",
    }  # fmt: skip
    return {name: HEADS[name].index(word) if word in HEADS[name] else -1 for name, word in words.items()}


def individual(rng: np.random.Generator) -> Individual:
    """A random one; some in shades without a name."""
    who = draw_individual(rng)
    if rng.random() < 0.4:
        a, b = (f"#{r:02x}{g:02x}{b:02x}" for r, g, b in rng.integers(20, 250, (2, 3)))
        who = replace(who, colour=a, second=b)
    return who


def look_alike(who: Individual, rng: np.random.Generator) -> Individual:
    """One that differs in one to three features; never one that looks like a held-out subject."""
    others = (other for other in similar(who, rng) if other.look not in HELD_OUT_LOOKS)
    return next(islice(others, int(rng.integers(3)), None))


def pair(rng: np.random.Generator) -> tuple[Scene, Scene]:
    """One individual twice, in different places."""
    return twice(individual(rng), rng)


def twice(who: Individual, rng: np.random.Generator) -> tuple[Scene, Scene]:
    first, second = (place(who, str(b), rng, night=0.05) for b in rng.choice(list(BACKGROUNDS), 2, replace=False))
    return first, second


def soften(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, noise and brightness, as generated pictures have them."""
    size = images.shape[-2:]
    if rng.random() < 0.7:
        small = F.interpolate(images, scale_factor=1 / rng.uniform(1, 3), mode="bilinear", antialias=True)
        images = F.interpolate(small, size=size, mode="bilinear")
    noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
    return images * rng.uniform(0.85, 1.1) + rng.uniform(-0.08, 0.08) + rng.uniform(0, 0.1) * noise


def batch_of(scenes: list[Scene], size: Size) -> Pairs:
    images = torch.stack([to_tensor(np.asarray(render(s, size).image)) for s in scenes])
    lines = [labels(s) for s in scenes]
    return Pairs(images, {name: torch.tensor([t[name] for t in lines]) for name in HEADS})


def draw_batch(step: int, cfg: Any, seed: int) -> Pairs:
    rng = np.random.default_rng([seed, step, 0x65])
    size = BUCKETS[int(rng.choice(3, p=(0.7, 0.15, 0.15)))]
    drawn = [individual(rng) for _ in range(cfg.batch // 4)]
    pairs = [twice(who, rng) for who in (*drawn, *(look_alike(who, rng) for who in drawn))]
    batch = batch_of([a for a, _ in pairs] + [b for _, b in pairs], size)
    return batch._replace(images=soften(batch.images, rng))


def same_individual(features: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE over the batch: each picture's partner among all others. Unit features [2N C]."""
    n = len(features) // 2
    scores = (features @ features.T / temperature).fill_diagonal_(-1e4)
    return F.cross_entropy(scores, torch.arange(2 * n).roll(n))


def found_partner(features: Tensor) -> float:
    """Share of pictures whose nearest other one is their partner. Unit features [2N C]."""
    nearest = (features @ features.T).fill_diagonal_(-2).argmax(-1)
    return (nearest == torch.arange(len(features)).roll(len(features) // 2)).float().mean().item()


class EvaluatorStage(Stage):
    def __init__(self, cfg: Any) -> None:
        nets = [nn.ModuleDict({"evaluator": Evaluator(tuple(cfg.widths))}) for _ in range(2)]
        if cfg.from_shipped:
            nets[0]["evaluator"].load_state_dict(Evaluator.load(base_folder() / "evaluator").state_dict())
        super().__init__(nets[0], nets[1], cfg)

    def loss(self, batch: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        net = self.nets["evaluator"]
        logits = net(batch.images)
        label_loss = torch.stack([F.cross_entropy(logits[k].float(), y, ignore_index=-1) for k, y in batch.labels.items()]).sum()
        half = len(batch.images) // 4
        ordinary = torch.cat([batch.images[:half], batch.images[2 * half : 3 * half]])
        identity = same_individual(net.features(ordinary).float())
        individuals = same_individual(net.individuals(batch.images).float(), temperature=0.07)
        parts = {"labels": label_loss, "identity": identity, "individuals": individuals}
        return sum(parts.values(), label_loss.new_zeros(())), {name: part.detach() for name, part in parts.items()}


@torch.no_grad()
def accuracies(net: Evaluator, n: int = 384) -> dict[str, float]:
    """On held-out scenes, per attribute; `identity`: the nearest picture among 2N shows the same individual."""
    batch = batch_of([scene(HELD_OUT + i) for i in range(n)], BUCKETS[0])
    logits = net(batch.images)
    result = {k: (logits[k].argmax(-1) == y).float().mean().item() for k, y in batch.labels.items()}
    rng = np.random.default_rng(1)
    pairs = [pair(rng) for _ in range(64)]
    result["gallery"] = fmean(gallery(net, name) for name in SUBJECTS)
    result["identity"] = found_partner(net.features(batch_of([a for a, _ in pairs] + [b for _, b in pairs], BUCKETS[0]).images))
    return {k: round(v, 3) for k, v in result.items()}


@torch.no_grad()
def gallery(net: Evaluator, subject: str) -> float:
    """Mean average precision of a held-out subject's photos, each among the others and its look-alikes."""
    photos, wrong = (
        net.individuals(torch.stack([to_tensor(np.asarray(p.image)) for p in pictures]))
        for pictures in (subject_photos(subject, 9), look_alike_pictures(subject, LOOK_ALIKES))
    )
    return of_photos(photos, wrong) or 0.0


def run(cfg: Any) -> None:
    out = Path(cfg.out) / "evaluator"
    torch.manual_seed(cfg.seed)
    stage = EvaluatorStage(cfg.evaluator)
    fit(stage, lambda step: draw_batch(step, cfg.evaluator, cfg.seed), out, workers=cfg.evaluator.workers)
    net = stage.ema["evaluator"].eval()
    net.save(out)
    (out / "accuracies.json").write_text(json.dumps(accuracies(net), indent=1) + "\n")
