"""The places a scene can happen in, painted with PIL on a supersampled canvas."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Painter = Callable[[Image.Image, np.random.Generator, float], None]


def shade(rgb: tuple[int, int, int], by: float) -> tuple[int, int, int]:
    return tuple(int(np.clip(c * by, 0, 255)) for c in rgb)  # type: ignore[return-value]


def fade(image: Image.Image, top: tuple[int, int, int], bottom: tuple[int, int, int], y0: float, y1: float) -> None:
    """Vertical gradient between two heights (fractions of the picture)."""
    w, h = image.size
    a, b = int(y0 * h), max(int(y0 * h) + 1, int(y1 * h))
    ramp = np.linspace(0, 1, b - a)[:, None] * (np.array(bottom) - np.array(top)) + np.array(top)
    strip = np.broadcast_to(ramp[:, None].astype(np.uint8), (b - a, w, 3))
    image.paste(Image.fromarray(np.ascontiguousarray(strip)), (0, a))


def disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)


def beach(image: Image.Image, rng: np.random.Generator, ground: float) -> None:
    w, h = image.size
    u = min(w, h)
    sea = ground - rng.uniform(0.14, 0.2)
    fade(image, (110, 188, 238), (206, 236, 250), 0, sea)
    fade(image, (22, 98, 182), (48, 148, 210), sea, ground)
    fade(image, (246, 220, 160), (232, 200, 130), ground, 1)
    draw = ImageDraw.Draw(image)
    disc(draw, rng.uniform(0.1, 0.9) * w, rng.uniform(0.08, 0.18) * h, 0.085 * u, (255, 226, 100))


def snow(image: Image.Image, rng: np.random.Generator, ground: float) -> None:
    w, h = image.size
    u = min(w, h)
    fade(image, (150, 172, 204), (206, 218, 234), 0, ground)
    draw = ImageDraw.Draw(image)
    for x in np.arange(rng.uniform(-0.1, 0.15), 1.2, 0.36) * w:
        top, half = (ground - rng.uniform(0.22, 0.34)) * h, 0.26 * u
        draw.polygon([(x - half, ground * h), (x, top), (x + half, ground * h)], fill=(116, 130, 160))
        draw.polygon(
            [
                (x - 0.3 * half, top + 0.3 * (ground * h - top)),
                (x, top),
                (x + 0.3 * half, top + 0.3 * (ground * h - top)),
            ],
            fill=(250, 250, 252),
        )
    fade(image, (240, 243, 250), (222, 230, 244), ground, 1)
    for x, y in rng.uniform(0, 1, (9, 2)):
        disc(draw, x * w, y * ground * h, 0.014 * u, (255, 255, 255))


def forest(image: Image.Image, rng: np.random.Generator, ground: float) -> None:
    w, h = image.size
    u = min(w, h)
    fade(image, (150, 200, 160), (190, 222, 180), 0, ground)
    draw = ImageDraw.Draw(image)
    for x in np.arange(rng.uniform(-0.05, 0.1), 1.1, 0.17) * w:
        top, half = (ground - rng.uniform(0.34, 0.52)) * h, rng.uniform(0.1, 0.13) * u
        green = shade((22, 92, 58), rng.uniform(0.75, 1.2))
        draw.polygon([(x - half, ground * h), (x, top), (x + half, ground * h)], fill=green)
    fade(image, (86, 136, 58), (66, 112, 46), ground, 1)


def city(image: Image.Image, rng: np.random.Generator, ground: float) -> None:
    w, h = image.size
    u = min(w, h)
    fade(image, (160, 184, 206), (204, 212, 220), 0, ground)
    draw = ImageDraw.Draw(image)
    x = rng.uniform(-0.12, 0.0) * w
    while x < w:
        wide, top = rng.uniform(0.2, 0.28) * u, (ground - rng.uniform(0.28, 0.52)) * h
        draw.rectangle([x, top, x + wide, ground * h], fill=shade((104, 106, 122), rng.uniform(0.7, 1.2)))
        for row in np.arange(top + 0.05 * u, ground * h - 0.06 * u, 0.1 * u):
            for col in (0.16, 0.58):
                draw.rectangle([x + col * wide, row, x + (col + 0.26) * wide, row + 0.05 * u], fill=(250, 226, 150))
        x += wide * 1.04
    fade(image, (92, 92, 100), (72, 72, 80), ground, 1)
    for x in np.arange(rng.uniform(-0.2, 0), 1, 0.3) * w:
        draw.rectangle([x, 0.9 * h, x + 0.15 * u, 0.925 * h], fill=(236, 232, 214))


def space(image: Image.Image, rng: np.random.Generator, ground: float) -> None:
    w, h = image.size
    u = min(w, h)
    fade(image, (12, 10, 36), (34, 18, 62), 0, 1)
    draw = ImageDraw.Draw(image)
    x, y = rng.uniform(0.08, 0.92) * w, rng.uniform(0.08, 0.24) * h
    disc(draw, x, y, 0.11 * u, ((196, 120, 84), (160, 96, 150), (110, 140, 190))[rng.integers(3)])
    draw.line([x - 0.17 * u, y + 0.05 * u, x + 0.17 * u, y - 0.05 * u], fill=(226, 206, 170), width=max(2, int(0.02 * u)))
    for x, y in rng.uniform(0, 1, (22, 2)):
        disc(draw, x * w, y * h, 0.011 * u, (255, 255, 240))


def room(image: Image.Image, rng: np.random.Generator, ground: float) -> None:
    w, h = image.size
    u = min(w, h)
    by = rng.uniform(0.93, 1.03)
    fade(image, shade((226, 204, 168), by), shade((206, 180, 142), by), 0, ground)
    fade(image, (150, 90, 52), (116, 66, 36), ground, 1)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, ground * h - 0.02 * u, w, ground * h], fill=(244, 236, 220))
    x, y = rng.uniform(0.05, 0.65) * w, rng.uniform(0.06, 0.14) * h
    draw.rectangle([x, y, x + 0.28 * u, y + 0.3 * u], fill=(110, 70, 44))
    draw.rectangle([x + 0.03 * u, y + 0.03 * u, x + 0.25 * u, y + 0.27 * u], fill=(168, 216, 242))


BACKGROUNDS: dict[str, Painter] = {
    "on the beach": beach,
    "in the snow": snow,
    "in the forest": forest,
    "in the city": city,
    "in space": space,
    "in a room": room,
}
