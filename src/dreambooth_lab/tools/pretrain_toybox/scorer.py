"""A tiny CLIP of the world for CLIP-I and CLIP-T.

Captions of a small world fit several pictures, so the contrastive targets are all pairs that agree in what the caption
says. Attribute heads on the picture side, used in training only, teach it the classes that contrast alone misses.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from dreambooth_lab.tools.pretrain_toybox.evaluator import batch_of, labels, soften
from dreambooth_lab.tools.pretrain_toybox.runner import Stage, fit
from dreambooth_lab.tools.pretrain_toybox.vae import HELD_OUT
from dreambooth_lab.toybox.captions import caption
from dreambooth_lab.toybox.evaluator import HEADS
from dreambooth_lab.toybox.tokenizer import build_tokenizer
from dreambooth_lab.toybox.world import SQUARE, Scene, prompts, render, scene

TOLD = ("kind", "colour", "background", "style")
MEAN, STD = 0.5, 0.5


class CaptionedBatch(NamedTuple):
    images: Tensor  # [B 3 s s], -1 … 1
    ids: Tensor  # [B L]
    labels: dict[str, Tensor]  # [B]
    fits: Tensor  # [B B]: row i, column j: caption j is true of picture i


def said(s: Scene, text: str) -> dict[str, bool]:
    who = s.who
    return {
        "kind": who.kind in text,
        "colour": f"{who.colour} {who.kind}" in text,
        "background": s.background in text,
        "style": s.style == "night" and "at night" in text,
    }


def fitting(scenes: list[Scene], texts: list[str]) -> Tensor:
    lines, mentioned = [labels(s) for s in scenes], [said(s, t) for s, t in zip(scenes, texts, strict=True)]
    fits = torch.ones(len(scenes), len(texts), dtype=torch.bool)
    for name in TOLD:
        is_, says = torch.tensor([t[name] for t in lines]), torch.tensor([m[name] for m in mentioned])
        fits &= (is_[:, None] == is_[None]) | ~says[None]
    return fits | torch.eye(len(scenes), dtype=torch.bool)


def shrink(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


class Draw:
    def __init__(self, cfg: Any, seed: int) -> None:
        self.cfg, self.seed, self.tokenizer = cfg, seed, build_tokenizer()

    def __call__(self, step: int) -> CaptionedBatch:
        rng = np.random.default_rng([self.seed, step, 0x63])
        scenes = [scene(int(i)) for i in rng.integers(HELD_OUT, size=self.cfg.batch)]
        texts = [caption(s, rng) for s in scenes]
        batch = batch_of(scenes, SQUARE)
        ids = self.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        images = shrink(soften(batch.images, rng), self.cfg.side)
        return CaptionedBatch(images, ids, batch.labels, fitting(scenes, texts))


def new_clip(cfg: Any) -> CLIPModel:
    tokenizer = build_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": cfg.text_width, "intermediate_size": 4 * cfg.text_width,
        "num_hidden_layers": cfg.text_layers, "num_attention_heads": 4, "projection_dim": cfg.width,
        "max_position_embeddings": tokenizer.model_max_length, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": cfg.vision_width, "intermediate_size": 4 * cfg.vision_width, "num_attention_heads": 4,
        "num_hidden_layers": cfg.vision_layers, "image_size": cfg.side, "patch_size": cfg.patch,
        "projection_dim": cfg.width,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=cfg.width))


def matching(scores: Tensor, fits: Tensor) -> Tensor:
    """Cross-entropy against all true captions (or pictures) of a row, equally."""
    return -(F.log_softmax(scores, -1) * fits / fits.sum(-1, keepdim=True)).sum(-1).mean()


class ScorerStage(Stage):
    def __init__(self, cfg: Any) -> None:
        super().__init__(self.build(cfg), self.build(cfg), cfg)

    @staticmethod
    def build(cfg: Any) -> nn.ModuleDict:
        heads = nn.ModuleDict({name: nn.Linear(cfg.width, len(words)) for name, words in HEADS.items()})
        return nn.ModuleDict({"clip": new_clip(cfg), "heads": heads})

    def loss(self, batch: CaptionedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        clip, heads = self.nets["clip"], self.nets["heads"]
        out = clip(input_ids=batch.ids, pixel_values=batch.images)
        scores, fits = out.logits_per_image.float(), batch.fits.float()
        contrast = matching(scores, fits) + matching(scores.T, fits.T)
        seen = out.vision_model_output.pooler_output  # [B width], projected
        label_loss = torch.stack(
            [F.cross_entropy(heads[k](seen).float(), y, ignore_index=-1) for k, y in batch.labels.items()]
        ).sum()
        return contrast + label_loss, {"contrast": contrast.detach(), "labels": label_loss.detach()}


@torch.no_grad()
def choices(folder: Path, n: int = 192) -> dict[str, float]:
    """Zero-shot accuracy of the saved scorer on held-out scenes: the best of all prompts of the world, by attribute."""
    clip, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    scenes = [scene(HELD_OUT + i) for i in range(n)]
    every = prompts()
    texts = [f"a photo of a {c} {k} {b}" for c, k, b in every]
    inputs = processor(text=texts, images=[render(s).image for s in scenes], return_tensors="pt", padding=True)
    best = [every[i] for i in clip(**inputs).logits_per_image.argmax(-1).tolist()]
    truth = [(s.who.colour, s.who.kind, s.background) for s in scenes]
    hits = np.array([[a == b for a, b in zip(x, y, strict=True)] for x, y in zip(best, truth, strict=True)])
    return dict(zip(("colour", "kind", "background"), hits.mean(0).round(3).tolist(), strict=True))


def save(clip: CLIPModel, cfg: Any, folder: Path) -> None:
    side = {"height": cfg.side, "width": cfg.side}
    images = CLIPImageProcessor(size={"shortest_edge": cfg.side}, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    clip.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=build_tokenizer()).save_pretrained(folder)


def run(cfg: Any) -> None:
    out = Path(cfg.out) / "scorer"
    torch.manual_seed(cfg.seed)
    stage = ScorerStage(cfg.scorer)
    fit(stage, Draw(cfg.scorer, cfg.seed), out, workers=cfg.scorer.workers)
    save(stage.ema["clip"].eval(), cfg.scorer, out / "clip")
    (out / "accuracies.json").write_text(json.dumps(choices(out / "clip"), indent=1) + "\n")
