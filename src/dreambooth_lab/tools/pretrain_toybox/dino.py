"""A small vision transformer in DINO's place: it tells individuals apart, wherever they are.

DINO's architecture, but not its self-distillation: the world can show one individual in two places, so the class token, and the
mean of the patches that the individual covers, learn to find the partner among all pictures of a batch (InfoNCE).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from dreambooth_lab.tools.pretrain_toybox.evaluator import found_partner, pair, same_individual, soften
from dreambooth_lab.tools.pretrain_toybox.runner import Stage, fit
from dreambooth_lab.tools.pretrain_toybox.scorer import MEAN, STD, shrink
from dreambooth_lab.tools.pretrain_toybox.vae import to_tensor
from dreambooth_lab.toybox.world import SQUARE, Scene, render


class MaskedPairs(NamedTuple):
    images: Tensor  # [2N 3 s s], -1 … 1: picture i and picture N + i show one individual
    cover: Tensor  # [2N P], how much of each patch it covers


def seen(scenes: list[Scene], cfg: Any, rng: np.random.Generator | None) -> MaskedPairs:
    """Scenes as the network gets them; softened as generated pictures are if there is a generator."""
    pictures = [render(s, SQUARE) for s in scenes]
    images = torch.stack([to_tensor(np.asarray(p.image)) for p in pictures])
    masks = torch.stack([torch.from_numpy(np.asarray(p.mask).astype(np.float32) / 255)[None] for p in pictures])
    images = images if rng is None else soften(images, rng)
    cover = F.adaptive_avg_pool2d(masks, cfg.side // cfg.patch).flatten(1)
    return MaskedPairs(shrink(images, cfg.side), cover)


def draw_batch(step: int, cfg: Any, seed: int) -> MaskedPairs:
    rng = np.random.default_rng([seed, step, 0x64])
    pairs = [pair(rng) for _ in range(cfg.batch // 2)]
    return seen([a for a, _ in pairs] + [b for _, b in pairs], cfg, rng)


def new_dino(cfg: Any) -> Any:
    return Dinov2Model(
        Dinov2Config(
            hidden_size=cfg.width, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, image_size=cfg.side,
            patch_size=cfg.patch, mlp_ratio=4,
        )
    )  # fmt: skip


def features(dino: Any, batch: MaskedPairs) -> tuple[Tensor, Tensor]:
    """Unit vectors of the class token and of the covered patches, each [2N C]."""
    tokens = dino(pixel_values=batch.images).last_hidden_state.float()
    covered = (tokens[:, 1:] * batch.cover[..., None]).sum(1) / batch.cover.sum(1, keepdim=True)
    return F.normalize(tokens[:, 0], dim=-1), F.normalize(covered, dim=-1)


class DinoStage(Stage):
    def __init__(self, cfg: Any) -> None:
        nets = [nn.ModuleDict({"dino": new_dino(cfg)}) for _ in range(2)]
        super().__init__(nets[0], nets[1], cfg)

    def loss(self, batch: MaskedPairs) -> tuple[Tensor, dict[str, Tensor]]:
        token, patches = (same_individual(each) for each in features(self.nets["dino"], batch))
        return token + patches, {"token": token.detach(), "patches": patches.detach()}


@torch.no_grad()
def accuracies(dino: Any, cfg: Any, n: int = 64) -> dict[str, float]:
    """Share of 2n pictures whose nearest other one shows the same individual; pairs that training does not draw."""
    rng = np.random.default_rng(1)
    pairs = [pair(rng) for _ in range(n)]
    both = features(dino, seen([a for a, _ in pairs] + [b for _, b in pairs], cfg, None))
    return {name: round(found_partner(vectors), 3) for name, vectors in zip(("class token", "patches"), both, strict=True)}


def save(dino: Any, cfg: Any, folder: Path) -> None:
    side = {"height": cfg.side, "width": cfg.side}
    dino.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": cfg.side}, crop_size=side, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(folder)


def run(cfg: Any) -> None:
    out = Path(cfg.out) / "dino"
    torch.manual_seed(cfg.seed)
    stage = DinoStage(cfg.dino)
    fit(stage, lambda step: draw_batch(step, cfg.dino, cfg.seed), out, workers=cfg.dino.workers)
    dino = stage.ema["dino"].eval()
    save(dino, cfg.dino, out / "vit")
    (out / "accuracies.json").write_text(json.dumps(accuracies(dino, cfg.dino), indent=1) + "\n")
