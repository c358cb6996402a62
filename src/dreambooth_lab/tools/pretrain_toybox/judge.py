"""The quality bar: 200 prompts 'a photo of a <colour> <class> <background>', judged by the shipped evaluator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from dreambooth_lab.tools.pretrain_toybox.card import card
from dreambooth_lab.tools.pretrain_toybox.runner import grid
from dreambooth_lab.tools.pretrain_toybox.unet import sample
from dreambooth_lab.toybox.evaluator import Evaluator
from dreambooth_lab.toybox.world import prompts


def chosen(n: int, seed: int) -> list[tuple[str, str, str]]:
    every = prompts()
    return [every[i] for i in np.random.default_rng([seed, 0x6A]).permutation(len(every))[:n]]


def draw_all(pipe: Any, asked: list[tuple[str, str, str]], cfg: Any) -> Tensor:
    texts = [f"a photo of a {c} {k} {b}" for c, k, b in asked]
    parts = range(0, len(texts), cfg.batch)
    drawn = [sample(pipe, texts[i : i + cfg.batch], cfg.first_seed + i, cfg.steps, cfg.guidance) for i in parts]
    return torch.cat(drawn)


def score(net: Evaluator, pictures: Tensor, asked: list[tuple[str, str, str]]) -> dict[str, float]:
    colours, kinds, places = zip(*asked, strict=True)
    seen = net.judge(pictures)
    pairs = {"class": (seen.kind, kinds), "colour": (seen.colour, colours), "background": (seen.background, places)}
    return {name: round(float(np.mean([a == b for a, b in zip(*both, strict=True)])), 3) for name, both in pairs.items()}


def by_class(net: Evaluator, pictures: Tensor, asked: list[tuple[str, str, str]]) -> dict[str, float]:
    seen = net.judge(pictures).kind
    hits: dict[str, list[bool]] = {}
    for (_, kind, _), predicted in zip(asked, seen, strict=True):
        hits.setdefault(kind, []).append(predicted == kind)
    return {kind: round(float(np.mean(h)), 3) for kind, h in sorted(hits.items())}


def run(cfg: Any) -> None:
    base, out = Path(cfg.base), Path(cfg.out) / "judge"
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    net, asked = Evaluator.load(base / "evaluator"), chosen(cfg.judge.prompts, cfg.seed)
    pictures = draw_all(pipe, asked, cfg.judge)
    result = score(net, pictures, asked) | {"by class": by_class(net, pictures, asked), "prompts": len(asked)}
    across = min(12, len(pictures))
    grid([row for row in pictures[:96].split(across) if len(row) == across], out / "samples.png")
    (out / "judge.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if (Path(cfg.out) / "unet/last.ckpt").exists():  # the card tells these numbers too
        (base / "README.md").write_text(card(cfg), encoding="utf-8")
