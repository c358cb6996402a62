"""A small supervised net that says what a picture of the world shows, and how alike two individuals are."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreambooth_lab.toybox.shapes import CLASSES, COLOURS, PATTERNS, VARIANTS
from dreambooth_lab.toybox.world import BACKGROUNDS, STYLES

HEADS: dict[str, tuple[str, ...]] = {
    "kind": tuple(CLASSES),
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "style": STYLES,
    "second": tuple(COLOURS),
    "pattern": PATTERNS,
    "variant": tuple(str(i) for i in range(VARIANTS)),
    "feature": ("no", "yes"),
}


IDENTITY = 64  # width of the identity embedding


class Verdict(NamedTuple):
    """Words, one a picture."""

    kind: list[str]
    colour: list[str]
    background: list[str]


class Evaluator(nn.Module):
    """Strided convolutions to a pooled feature; one linear head an attribute, one for resemblance of individuals (`features`),
    and one that tells an individual from look-alikes (`individuals`)."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 96, 128)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        blocks: list[nn.Module] = []
        for before, width in zip((3, *self.widths), self.widths, strict=False):
            blocks += [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*blocks)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * width, len(words)) for name, words in HEADS.items()})
        self.identity = nn.Linear(2 * width, IDENTITY)
        self.individual = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, IDENTITY))

    def pool(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1], [B 3 H W] → mean and strongest response of each feature [B 2C]."""
        maps = self.body(images).flatten(2)  # [B C h·w]
        return torch.cat([maps.mean(-1), maps.amax(-1)], -1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pooled = self.pool(images)
        return {name: head(pooled) for name, head in self.heads.items()}

    def features(self, images: Tensor) -> Tensor:
        """Unit vectors that are close for pictures of the same individual, wherever it is [B 64]."""
        return F.normalize(self.identity(self.pool(images)), dim=-1)

    def individuals(self, images: Tensor) -> Tensor:
        """Unit vectors that are close for pictures of the same individual and far apart for look-alikes [B 64]."""
        return F.normalize(self.individual(self.pool(images)), dim=-1)

    @torch.no_grad()
    def judge(self, images: Tensor) -> Verdict:
        logits = self(images)
        values = {name: [HEADS[name][i] for i in logits[name].argmax(-1).tolist()] for name in Verdict._fields}
        return Verdict(**values)

    @torch.no_grad()
    def similarity(self, images: Tensor, references: Tensor) -> Tensor:
        """Mean cosine of each picture's features with those of the references [B]."""
        return (self.features(images) @ self.features(references).T).mean(-1)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"widths": self.widths, "heads": HEADS}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Evaluator":
        widths = json.loads((folder / "config.json").read_text())["widths"]
        model = cls(tuple(widths))
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return model.eval().requires_grad_(False)
