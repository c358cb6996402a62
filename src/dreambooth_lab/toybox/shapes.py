"""How each object class is drawn: an `Individual` becomes a list of filled, outlined polygons.

Local coordinates: the object stands on y = 0, its height points to -y, x = 0 is its middle.
"""

from dataclasses import dataclass

import numpy as np

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (222, 32, 32),
    "orange": (255, 136, 16),
    "yellow": (252, 214, 40),
    "green": (44, 160, 60),
    "blue": (36, 88, 220),
    "purple": (124, 52, 176),
    "pink": (255, 130, 190),
    "white": (244, 242, 246),
}
# shades of held-out subjects only: the base never sees them
SUBJECT_SHADES: dict[str, Rgb] = {"teal": (0, 158, 158), "brown": (134, 82, 44), "lime": (176, 226, 40)}
SHADES = COLOURS | SUBJECT_SHADES
PATTERNS = ("plain", "spots", "stripes")
VARIANTS = 3

BLACK: Rgb = (24, 22, 30)
WHITE: Rgb = (250, 250, 250)
GLASS: Rgb = (190, 226, 244)
GREY: Rgb = (150, 154, 162)


def rgb(colour: str) -> Rgb:
    """A named shade, or '#rrggbb'."""
    if colour.startswith("#"):
        return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
    return SHADES[colour]


@dataclass(frozen=True)
class Individual:
    """One particular robot, car, …: everything about it that stays the same from picture to picture."""

    kind: str
    colour: str
    second: str
    variant: int  # 0 … VARIANTS-1: the silhouette
    pattern: str
    feature: bool  # antennas, lamp, chimney, bow, steam or crest, by class

    @property
    def look(self) -> tuple[str, str, str]:
        return self.kind, self.colour, self.second


@dataclass(frozen=True)
class Part:
    points: np.ndarray  # [N 2], local coordinates
    fill: Rgb
    outline: bool = True


def poly(points: list[tuple[float, float]], fill: Rgb, outline: bool = True) -> Part:
    return Part(np.asarray(points, dtype=np.float64), fill, outline)


def box(x0: float, y0: float, x1: float, y1: float, fill: Rgb, outline: bool = True) -> Part:
    return poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline)


def oval(x: float, y: float, rx: float, ry: float, fill: Rgb, outline: bool = True, n: int = 28) -> Part:
    a = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return Part(np.stack([x + rx * np.cos(a), y + ry * np.sin(a)], 1), fill, outline)


def pattern_parts(kind: str, x0: float, y0: float, x1: float, y1: float, fill: Rgb) -> list[Part]:
    """Spots or stripes inside a panel that lies within the body."""
    if kind == "plain":
        return []
    w, h = x1 - x0, y1 - y0
    if kind == "stripes":
        n = 3 if w >= h else 2
        across = w >= h  # stripes run across the longer side, so they stay wide
        step = (w if across else h) / (2 * n - 1)
        if across:
            return [box(x0 + 2 * i * step, y0, x0 + (2 * i + 1) * step, y1, fill, False) for i in range(n)]
        return [box(x0, y0 + 2 * i * step, x1, y0 + (2 * i + 1) * step, fill, False) for i in range(n)]
    r = min(0.085, 0.24 * min(w, h))
    at = [(0.22, 0.25), (0.78, 0.2), (0.5, 0.55), (0.15, 0.82), (0.85, 0.8)]
    return [oval(x0 + fx * w, y0 + fy * h, r, r, fill, False, 16) for fx, fy in at]


def eye(x: float, y: float, r: float) -> list[Part]:
    return [oval(x, y, r, r, WHITE), oval(x, y, 0.5 * r, 0.5 * r, BLACK, False)]


def robot(who: Individual) -> list[Part]:
    main, second = rgb(who.colour), rgb(who.second)
    parts = []
    if who.feature:
        for x in (-0.14, 0.14):
            parts += [box(x - 0.018, -1.0, x + 0.018, -0.82, BLACK, False), oval(x, -0.99, 0.055, 0.055, second)]
    parts += [box(-0.24, -0.22, -0.06, 0, second), box(0.06, -0.22, 0.24, 0, second)]  # legs
    parts += [box(-0.45, -0.5, -0.25, -0.38, second), box(0.25, -0.5, 0.45, -0.38, second)]  # arms
    parts += [box(-0.29, -0.56, 0.29, -0.18, main)]
    parts += pattern_parts(who.pattern, -0.22, -0.5, 0.22, -0.24, second)
    head = (
        box(-0.25, -0.88, 0.25, -0.56, main),
        oval(0, -0.72, 0.25, 0.18, main),
        poly([(-0.16, -0.88), (0.16, -0.88), (0.3, -0.56), (-0.3, -0.56)], main),
    )[who.variant]
    parts.append(head)
    if who.variant == 2:  # one-eyed
        return parts + eye(0, -0.73, 0.11)
    return parts + eye(-0.11, -0.74, 0.08) + eye(0.11, -0.74, 0.08) + [box(-0.1, -0.63, 0.1, -0.595, BLACK, False)]


def car(who: Individual) -> list[Part]:
    main, second = rgb(who.colour), rgb(who.second)
    parts = []
    roof = (-0.74, -0.78, -0.72)[who.variant]
    if who.feature:
        parts.append(box(-0.12, roof - 0.1, 0.08, roof + 0.02, second))  # lamp on the roof
    if who.variant == 0:  # saloon
        parts.append(poly([(-0.42, -0.42), (-0.26, -0.74), (0.2, -0.74), (0.4, -0.42)], main))
        parts.append(poly([(-0.31, -0.45), (-0.2, -0.67), (-0.04, -0.67), (-0.04, -0.45)], GLASS))
        parts.append(poly([(0.03, -0.45), (0.03, -0.67), (0.16, -0.67), (0.29, -0.45)], GLASS))
        parts.append(box(-0.7, -0.45, 0.7, -0.13, main))
    elif who.variant == 1:  # van
        parts.append(poly([(-0.66, -0.78), (0.3, -0.78), (0.5, -0.48), (0.7, -0.42), (0.7, -0.13), (-0.66, -0.13)], main))
        parts.append(box(-0.56, -0.7, -0.16, -0.48, GLASS))
        parts.append(poly([(-0.06, -0.7), (0.24, -0.7), (0.38, -0.48), (-0.06, -0.48)], GLASS))
    else:  # beetle
        a = np.linspace(np.pi, 2 * np.pi, 20)
        parts.append(Part(np.stack([0.66 * np.cos(a), -0.14 + 0.58 * np.sin(a)], 1), main))
        parts.append(poly([(-0.34, -0.45), (-0.2, -0.63), (-0.04, -0.65), (-0.04, -0.45)], GLASS))
        parts.append(poly([(0.05, -0.45), (0.05, -0.65), (0.2, -0.63), (0.34, -0.45)], GLASS))
    parts += pattern_parts(who.pattern, -0.5, -0.38, 0.5, -0.21, second)
    parts.append(oval(0.62, -0.33, 0.06, 0.06, (255, 244, 170)))  # headlight
    for x in (-0.4, 0.4):
        parts += [oval(x, -0.14, 0.16, 0.16, BLACK), oval(x, -0.14, 0.07, 0.07, GREY, False)]
    return parts


def house(who: Individual) -> list[Part]:
    main, second = rgb(who.colour), rgb(who.second)
    parts = []
    if who.feature:
        parts.append(box(0.22, -0.98, 0.36, -0.6, GREY))  # chimney
    top = (-0.56, -0.56, -0.66)[who.variant]
    half = (0.44, 0.44, 0.32)[who.variant]
    parts.append(box(-half, top, half, 0, main))
    roof = (
        [(-0.54, -0.54), (0, -0.98), (0.54, -0.54)],
        [(-0.54, -0.5), (-0.54, -0.9), (0.54, -0.62), (0.54, -0.5)],
        [(-0.4, -0.64), (-0.2, -0.94), (0.2, -0.94), (0.4, -0.64)],
    )[who.variant]
    parts += pattern_parts(who.pattern, -half + 0.06, top + 0.08, half - 0.06, -0.06, second)
    parts.append(poly(roof, second))
    parts.append(box(-0.1, -0.3, 0.1, 0, (112, 66, 40)))
    for x in (-half + 0.14, half - 0.14):
        parts.append(box(x - 0.085, top + 0.12, x + 0.085, top + 0.28, GLASS))
    return parts


def cat(who: Individual) -> list[Part]:
    main, second = rgb(who.colour), rgb(who.second)
    wide, tall = ((0.27, 0.26), (0.34, 0.25), (0.22, 0.29))[who.variant]
    parts = [poly([(0.16, -0.1), (0.42, -0.12), (0.44, -0.42), (0.53, -0.42), (0.54, -0.02), (0.16, 0.0)], main)]  # tail
    parts.append(oval(0, -tall + 0.01, wide, tall, main))
    parts += pattern_parts(who.pattern, -0.72 * wide, -0.4, 0.72 * wide, -0.1, second)
    for s in (-1, 1):
        parts.append(poly([(s * 0.28, -0.72), (s * 0.26, -1.0), (s * 0.06, -0.86)], main))
    parts.append(oval(0, -0.66, 0.31, 0.24, main))
    for s in (-1, 1):
        parts.append(oval(s * 0.12, -0.7, 0.07, 0.085, (196, 240, 120)))
        parts.append(oval(s * 0.12, -0.7, 0.028, 0.07, BLACK, False))
        parts.append(poly([(s * 0.12, -0.575), (s * 0.4, -0.63), (s * 0.4, -0.6)], BLACK, False))  # whiskers
        parts.append(poly([(s * 0.12, -0.555), (s * 0.4, -0.53), (s * 0.4, -0.5)], BLACK, False))
    parts.append(poly([(-0.05, -0.6), (0.05, -0.6), (0, -0.55)], (240, 110, 130)))
    if who.feature:  # bow
        parts += [poly([(0, -0.42), (s * 0.17, -0.5), (s * 0.17, -0.34)], second) for s in (-1, 1)]
    return parts


def cup(who: Individual) -> list[Part]:
    main, second = rgb(who.colour), rgb(who.second)
    top, bottom = ((0.34, 0.34), (0.42, 0.24), (0.3, 0.4))[who.variant]
    parts = []
    if who.feature:  # steam
        for x in (-0.14, 0.1):
            parts.append(
                poly(
                    [
                        (x, -0.98),
                        (x + 0.06, -0.92),
                        (x, -0.86),
                        (x + 0.06, -0.8),
                        (x + 0.1, -0.8),
                        (x + 0.05, -0.86),
                        (x + 0.1, -0.92),
                        (x + 0.04, -0.98),
                    ],
                    WHITE,
                    False,
                )
            )
    side = 0.5 * (top + bottom)
    parts += [oval(side + 0.06, -0.4, 0.2, 0.2, second), oval(side + 0.06, -0.4, 0.1, 0.1, GREY)]  # handle
    a = np.linspace(0, np.pi, 14)
    rim = np.stack([bottom * np.cos(a), -0.1 + 0.08 * np.sin(a)], 1)
    parts.append(Part(np.concatenate([[(-top, -0.7)], [(top, -0.7)], rim]), main))
    parts.append(oval(0, -0.7, top, 0.085, (92, 56, 36)))  # what is in it
    narrow = min(top, bottom) - 0.05
    parts += pattern_parts(who.pattern, -narrow, -0.54, narrow, -0.14, second)
    return parts


def fish(who: Individual) -> list[Part]:
    main, second = rgb(who.colour), rgb(who.second)
    long, tall = ((0.5, 0.3), (0.42, 0.36), (0.56, 0.23))[who.variant]
    y = -0.44
    parts = [poly([(-long + 0.1, y), (-0.8, y - 0.28), (-0.72, y), (-0.8, y + 0.28)], second)]  # tail
    if who.feature:
        parts.append(poly([(-0.26, y - 0.7 * tall), (0.0, y - tall - 0.2), (0.2, y - 0.7 * tall)], second))  # crest
    parts.append(poly([(-0.12, y + 0.7 * tall), (0.02, y + tall + 0.12), (0.16, y + 0.7 * tall)], second))
    parts.append(oval(0, y, long, tall, main))
    parts += pattern_parts(who.pattern, -0.62 * long, y - 0.55 * tall, 0.26 * long, y + 0.55 * tall, second)
    parts += eye(0.58 * long, y - 0.2 * tall, 0.085)
    parts.append(
        poly([(0.74 * long, y + 0.3 * tall), (0.93 * long, y + 0.2 * tall), (0.72 * long, y + 0.42 * tall)], BLACK, False)
    )
    return parts


CLASSES = {"robot": robot, "car": car, "house": house, "cat": cat, "cup": cup, "fish": fish}
FEATURES = {"robot": "antennas", "car": "a lamp", "house": "a chimney", "cat": "a bow", "cup": "steam", "fish": "a fin"}


def parts_of(who: Individual) -> list[Part]:
    return CLASSES[who.kind](who)
