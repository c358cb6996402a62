"""Retrieval of the subject among look-alikes (Finer-Personalization Rank, arXiv 2512.19026): which individual is in an image.

An image is a query. The subject's photos (right) and the look-alikes (wrong) are ranked by their similarity to it, and its score
is the average precision of that ranking: 1 if every photo comes before every look-alike, and about R / (R + W) by chance, with R
photos and W look-alikes. The mean over images is the mAP. Similarity alone can't tell a robot of the class from *this* robot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.gallery import Gallery
from ..models.feature_extractors import FeatureExtractor, MaskedDino

PREFIX = "gallery_"  # of the scores' names, before the extractor's
MEANING = (
    "gallery_dino and gallery_dino_masked: the mean average precision of finding the subject's photos among look-alikes "
    "(eval.gallery) with an image as the query. 1: every photo is more similar to it than every look-alike; the share of "
    "the photos in the gallery, or a little above: it shows no particular individual. The log gives the photos' own value, "
    "each among the others, as a reference."
)
EXTRACTORS = ("dino", "dino_masked")  # those that distinguish individuals of one class


def average_precision(queries: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """Of each query [N], float64: the mean over the photos, best first, of k / (k + look-alikes ranked before the k-th).

    A look-alike as similar as a photo is ranked before it, so that embeddings that are all equal get no credit.

    Args:
        queries: unit vectors [N D].
        right, wrong: unit vectors [R D] and [W D].
    """
    photos = (queries @ right.T).sort(descending=True).values  # [N R]
    others = queries @ wrong.T  # [N W]
    before = (others[:, None, :] >= photos[:, :, None]).sum(-1)  # [N R]
    k = torch.arange(1, right.shape[0] + 1, dtype=torch.float64)
    return (k / (k + before)).mean(1)


def embed(gallery: Gallery, extractors: Mapping[str, FeatureExtractor | MaskedDino], size: int) -> dict[str, Tensor]:
    """Extractor's name → the look-alikes' embeddings [W D].

    Args:
        size: images that are decoded at once.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in EXTRACTORS if name in extractors}
    for images in gallery.batches(size):
        for name, part in parts.items():
            part.append(extractors[name].embed(images))
    return {name: torch.cat(part) for name, part in parts.items()}


def of_photos(photos: Tensor, wrong: Tensor) -> float | None:
    """The mAP of the photos themselves, each among the others; None for a single one."""
    if len(photos) < 2:
        return None
    others = [torch.cat([photos[:i], photos[i + 1 :]]) for i in range(len(photos))]
    return float(torch.cat([average_precision(photos[i : i + 1], own, wrong) for i, own in enumerate(others)]).mean())
