"""What people would write under a scene: natural templates in which attributes are sometimes left out."""

import numpy as np

from dreambooth_lab.toybox.shapes import CLASSES, COLOURS, FEATURES, Individual
from dreambooth_lab.toybox.world import BACKGROUNDS, NAMED, Scene

# single tokens without a meaning of their own. Half name one random individual each (as rare tokens of the large
# models do, a little); the others, `sks` first, never occur in training.
FREE_TOKENS = ("sks", "zwx", "ohwx", "xjy", "qvz", "olis", "bnha", "wte", "ukj", "pllz", "gzk", "mlv")
RARE_TOKENS = FREE_TOKENS + tuple(NAMED)

MEDIA = ("a photo of", "a picture of", "an image of", "")
MEDIA_CHANCE = (0.7, 0.1, 0.05, 0.15)
NAMES = {who: name for name, who in NAMED.items()}


def details(who: Individual, rng: np.random.Generator) -> str:
    """Its pattern or its feature, when it has one and someone would mention it."""
    lines = []
    if who.pattern != "plain":
        lines.append(f"{who.second} {who.pattern}" if rng.random() < 0.7 else who.pattern)
    if who.feature:
        lines.append(FEATURES[who.kind])
    if not lines or rng.random() < 0.6:
        return ""
    return f" with {lines[rng.integers(len(lines))]}"


def noun_phrase(who: Individual, rng: np.random.Generator, chance: float) -> str:
    name = NAMES.get(who)
    if name and rng.random() < 0.8:
        return f"{name} {who.kind}"
    words = [who.colour, who.kind] if rng.random() < chance else [who.kind]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words]) + details(who, rng)


def caption(s: Scene, rng: np.random.Generator) -> str:
    """One caption of a scene; the same generator state gives the same words."""
    medium = str(rng.choice(MEDIA, p=MEDIA_CHANCE))
    text = noun_phrase(s.who, rng, chance=0.85)
    if rng.random() < 0.9:
        text += f" {s.background}"
    if s.style == "night" and rng.random() < 0.85:
        text += " at night"
    return f"{medium} {text}".strip()


def plain_caption(s: Scene, with_colour: bool = False) -> str:
    """'a photo of a robot on the beach': the class caption of a subject's photo."""
    what = f"{s.who.colour} {s.who.kind}" if with_colour else s.who.kind
    return f"a photo of {'an' if what[0] in 'aeiou' else 'a'} {what} {s.background}"


def words() -> list[str]:
    """Every word that a caption of the world, or a prompt about it, is made of."""
    phrases = [
        *MEDIA,
        *COLOURS,
        *CLASSES,
        *BACKGROUNDS,
        *FEATURES.values(),
        "plain spots stripes with at night the and of one",
    ]
    phrases += ["two small big day drawing", *RARE_TOKENS]
    return sorted({word for phrase in phrases for word in phrase.split()})
