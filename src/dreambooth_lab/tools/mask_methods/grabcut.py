"""Masks without a network (GrabCut) and their post-processing (holes, components, borders), with OpenCV."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...config import ConfigError

Pixels = NDArray[np.uint8]  # [H W 3] in sRGB
Found = NDArray[np.float32]  # [H W]: confidence that a pixel belongs to the subject, in [0, 1]
Rect = tuple[int, int, int, int]  # left, top, width, height, in pixels

WORKING = 384  # px: longer sides are downscaled for GrabCut, whose time grows with the area
ROUNDS = 4  # of GrabCut
EDGE = 0.04  # share of a side along the border that is assumed to be background
CORE = 0.25  # half axes of the ellipse that GrabCut starts from, as shares of the sides


def opencv() -> Any:
    """The module cv2.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigError("masks need OpenCV: pip install 'dreambooth-lab[masks]' (or opencv-python-headless)") from error
    return cv2


def grabcut(pixels: Pixels, rect: Rect | None = None) -> Found:
    """GrabCut (Rother et al. 2004): the share of three starting regions with which a pixel is foreground; of one with a given
    rectangle.

    The regions are a rectangle just inside the border, an ellipse in the middle, and central pixels unlike the border.
    """
    cv2 = opencv()
    height, width = pixels.shape[:2]
    scale = min(1.0, WORKING / max(height, width))
    size = max(round(width * scale), 8), max(round(height * scale), 8)
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    starts = _starts(small) if rect is None else [_inside(small.shape[:2], _scaled(rect, (width, height), size))]
    votes = np.mean([_cut(small, start) for start in starts], axis=0, dtype=np.float32)
    return np.clip(cv2.resize(votes, (width, height), interpolation=cv2.INTER_LINEAR), 0, 1)


def _scaled(rect: Rect, original: tuple[int, int], size: tuple[int, int]) -> Rect:
    across, down = size[0] / original[0], size[1] / original[1]
    left, top = round(rect[0] * across), round(rect[1] * down)
    return left, top, max(round(rect[2] * across), 1), max(round(rect[3] * down), 1)


def _cut(pixels: Pixels, start: Pixels) -> NDArray[np.bool_]:
    """One run from labels [H W]; the same pixels and labels give the same cut."""
    cv2 = opencv()
    labels = start.copy()
    if not ((labels == cv2.GC_PR_FGD).any() and (labels != cv2.GC_PR_FGD).any()):
        return np.zeros(labels.shape, dtype=bool)
    cv2.setRNGSeed(0)
    cv2.grabCut(pixels, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), ROUNDS, cv2.GC_INIT_WITH_MASK)
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def _inside(size: tuple[int, int], rect: Rect) -> Pixels:
    """Labels: perhaps the subject inside the rectangle, background outside."""
    cv2 = opencv()
    labels = np.full(size, cv2.GC_BGD, dtype=np.uint8)
    left, top, width, height = rect
    labels[top : top + height, left : left + width] = cv2.GC_PR_FGD
    return labels


def _starts(pixels: Pixels) -> list[Pixels]:
    cv2 = opencv()
    height, width = pixels.shape[:2]
    down, across = max(round(height * EDGE), 1), max(round(width * EDGE), 1)
    whole = _inside((height, width), (across, down, width - 2 * across, height - 2 * down))
    y, x = np.mgrid[:height, :width]
    middle = ((y - height / 2) / height) ** 2 + ((x - width / 2) / width) ** 2
    seeds = [middle < CORE**2, _unlike_border(pixels, middle)]
    return [whole, *(np.where(~seed & (whole == cv2.GC_PR_FGD), cv2.GC_PR_BGD, whole).astype(np.uint8) for seed in seeds)]


def _unlike_border(pixels: Pixels, middle: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Central pixels whose Lab colour is far from the border's colours, by Otsu's threshold."""
    cv2 = opencv()
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).astype(np.float32)
    width = max(round(min(lab.shape[:2]) * EDGE), 2)
    strips = (lab[:width], lab[-width:], lab[:, :width], lab[:, -width:])
    border = np.concatenate([strip.reshape(-1, 3) for strip in strips])
    cv2.setRNGSeed(0)
    stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 1.0)
    _, _, colours = cv2.kmeans(border, 6, None, stop, 3, cv2.KMEANS_PP_CENTERS)
    far = np.min([np.linalg.norm(lab - colour, axis=-1) for colour in colours], axis=0)
    score = cv2.GaussianBlur(far * np.exp(-middle / 0.35**2), (0, 0), max(min(lab.shape[:2]) / 64, 0.5))
    levels = (255 * score / max(float(score.max()), 1e-6)).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_OTSU)
    return levels > threshold


class Finish(NamedTuple):
    """The post-processing steps, in this order."""

    threshold: float = 0.5  # minimum confidence
    soft: bool = False  # keep the confidence above the threshold as grey levels
    largest_only: bool = False
    fill_holes: bool = False
    padding: int = 0  # px by which the subject grows
    invert: bool = False
    blur: int = 0  # px over which borders are blurred

    def of(self, found: Found) -> Pixels | None:
        """The mask [H W], 255 inside; None if nothing was found."""
        sure = found >= self.threshold
        if not sure.any():
            return None
        if self.largest_only:
            sure &= _largest(sure)
        mask = np.where(sure, np.rint(found.clip(0, 1) * 255) if self.soft else 255, 0).astype(np.uint8)
        if self.fill_holes:
            mask[_holes(sure)] = 255
        if self.padding:
            mask = opencv().dilate(mask, _disc(self.padding))
        if self.invert:
            mask = 255 - mask
        if self.blur:
            mask = opencv().GaussianBlur(mask, (2 * self.blur + 1,) * 2, 0)
        return mask if mask.any() else None


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected component (8-connectivity)."""
    _, labels, facts, _ = opencv().connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return labels == 1 + facts[1:, opencv().CC_STAT_AREA].argmax()


def _holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Background that is not connected to the border."""
    around = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
    _, labels = opencv().connectedComponents(around, connectivity=4)
    return (labels != labels[0, 0])[1:-1, 1:-1] & ~mask


def _disc(radius: int) -> Pixels:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x**2 + y**2 <= radius**2).astype(np.uint8)
