"""The drawn world: a scene is a pure function of an integer seed, or of an explicit `Scene`.

numpy and PIL only. Pictures are drawn at twice their size and reduced, so edges are smooth.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from dreambooth_lab.toybox.backgrounds import BACKGROUNDS
from dreambooth_lab.toybox.shapes import BLACK, CLASSES, COLOURS, PATTERNS, VARIANTS, Individual, parts_of

Size = tuple[int, int]  # (height, width), pixels

SQUARE: Size = (128, 128)
BUCKETS: tuple[Size, ...] = (SQUARE, (96, 160), (160, 96))
STYLES = ("photo", "night")
SCALE = 2  # supersampling
WIDE = ("car", "fish")  # longer than high

SUBJECTS: dict[str, Individual] = {
    "robot": Individual("robot", "teal", "orange", 2, "spots", True),
    "cat": Individual("cat", "brown", "yellow", 1, "stripes", True),
    "car": Individual("car", "pink", "green", 2, "spots", True),
    "cup": Individual("cup", "lime", "purple", 1, "spots", False),
    "fish": Individual("fish", "purple", "yellow", 1, "stripes", True),
    "house": Individual("house", "white", "teal", 2, "stripes", True),
}
HELD_OUT_LOOKS = frozenset(who.look for who in SUBJECTS.values())

# a few rare tokens name one ordinary individual each
NAMED: dict[str, Individual] = {
    "vqk": Individual("robot", "blue", "yellow", 0, "stripes", False),
    "jrx": Individual("car", "green", "white", 1, "plain", True),
    "tzb": Individual("house", "orange", "blue", 1, "plain", False),
    "fwd": Individual("cat", "white", "red", 2, "spots", True),
    "hbg": Individual("cup", "pink", "blue", 0, "stripes", True),
    "nkp": Individual("fish", "red", "purple", 2, "plain", True),
    "ydl": Individual("robot", "pink", "green", 1, "plain", True),
    "cqm": Individual("cat", "orange", "purple", 0, "plain", False),
}
NAMED_EVERY = 100  # one scene in so many shows one of them


@dataclass(frozen=True)
class Scene:
    """A whole picture: who, where, how large, and the seed of what is left to chance."""

    who: Individual
    background: str
    style: str = "photo"
    scale: float = 0.7  # the object's longer side over the picture's shorter one
    x: float = 0.5  # the object's middle, fraction of the width
    tilt: float = 0.0  # degrees
    flip: bool = False
    seed: int = 0  # the background's accidents


@dataclass(frozen=True)
class Picture:
    image: Image.Image  # RGB
    mask: Image.Image  # L, 255 where the object is
    scene: Scene


def draw_individual(rng: np.random.Generator) -> Individual:
    """A random individual of the training world; never one that looks like a held-out subject."""
    while True:
        colour, second = rng.choice(list(COLOURS), 2, replace=False)
        kind, pattern = rng.choice(list(CLASSES)), rng.choice(PATTERNS, p=(0.5, 0.25, 0.25))
        who = Individual(str(kind), str(colour), str(second), int(rng.integers(VARIANTS)), str(pattern), bool(rng.random() < 0.5))
        if who.look not in HELD_OUT_LOOKS:
            return who


def place(who: Individual, background: str, rng: np.random.Generator, night: float = 0.0) -> Scene:
    """The individual somewhere in a place: size, position, tilt and side at random."""
    return Scene(
        who=who,
        background=background,
        style="night" if rng.random() < night and background != "in space" else "photo",
        scale=float(rng.uniform(0.62, 0.9)),
        x=float(rng.uniform(0.42, 0.58)),
        tilt=float(rng.uniform(-4, 4)),
        flip=bool(rng.random() < 0.5),
        seed=int(rng.integers(2**31)),
    )


def scene(seed: int) -> Scene:
    """The training world's scene number `seed`."""
    rng = np.random.default_rng([seed, 0x70])
    named = seed % NAMED_EVERY == NAMED_EVERY - 1
    who = NAMED[str(rng.choice(list(NAMED)))] if named else draw_individual(rng)
    return place(who, str(rng.choice(list(BACKGROUNDS))), rng, night=0.08)


def project(points: np.ndarray, s: Scene, size: Size) -> np.ndarray:
    """Local coordinates → supersampled pixels; [N 2] → [N 2]."""
    h, w = size
    wide = s.who.kind in WIDE
    unit = s.scale * min(h, w) * SCALE * (0.78 if wide else 0.95)
    a = np.deg2rad(s.tilt)
    turn = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    local = points * np.array([-1.0 if s.flip else 1.0, 1.0]) @ turn.T
    foot = 0.5 + 0.5 * s.scale * (0.62 if wide else 0.98) * min(h, w) / h
    return local * unit + np.array([s.x * w, min(0.95, foot + 0.06) * h]) * SCALE


def paint_object(s: Scene, size: Size, image: Image.Image, mask: Image.Image) -> None:
    draw, cut = ImageDraw.Draw(image), ImageDraw.Draw(mask)
    line = max(2, round(0.016 * min(size) * SCALE))
    for part in parts_of(s.who):
        points = [tuple(p) for p in project(part.points, s, size)]
        draw.polygon(points, fill=part.fill)
        cut.polygon(points, fill=255)
        if part.outline:
            draw.line(points + points[:2], fill=BLACK, width=line, joint="curve")
            cut.line(points + points[:2], fill=255, width=line, joint="curve")


def paint_shadow(s: Scene, size: Size, image: Image.Image) -> None:
    if s.background == "in space":
        return
    wide = 0.6 if s.who.kind in WIDE else 0.42
    corners = project(np.array([(-wide, -0.045), (wide, 0.06)]), replace(s, tilt=0.0, flip=False), size)
    shadow = Image.new("L", image.size, 0)
    ImageDraw.Draw(shadow).ellipse([*corners[0], *corners[1]], fill=96)
    image.paste((30, 26, 30), (0, 0), shadow)


def render(s: Scene, size: Size = SQUARE) -> Picture:
    """Draw a scene; the same scene and size give the same pixels."""
    h, w = size
    rng = np.random.default_rng([s.seed, 0x62])
    image, mask = Image.new("RGB", (w * SCALE, h * SCALE)), Image.new("L", (w * SCALE, h * SCALE))
    BACKGROUNDS[s.background](image, rng, float(rng.uniform(0.55, 0.64)))
    paint_shadow(s, size, image)
    paint_object(s, size, image, mask)
    image, mask = image.reduce(SCALE), mask.reduce(SCALE)
    if s.style == "night":
        image = Image.fromarray((np.asarray(image) * np.array([0.42, 0.46, 0.66])).astype(np.uint8))
    return Picture(image, mask, s)


def prompts() -> list[tuple[str, str, str]]:
    """Every (colour, class, background) of the world, in a fixed order."""
    return list(product(COLOURS, CLASSES, BACKGROUNDS))
