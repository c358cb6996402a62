"""The 30 subjects of the DreamBooth paper's dataset (Ruiz et al. 2023, github.com/google/dreambooth; CC BY 4.0)."""

from __future__ import annotations

CLASSES = {
    "backpack": "backpack", "backpack_dog": "backpack", "bear_plushie": "stuffed animal", "berry_bowl": "bowl", "can": "can",
    "candle": "candle", "cat": "cat", "cat2": "cat", "clock": "clock", "colorful_sneaker": "sneaker", "dog": "dog", "dog2": "dog",
    "dog3": "dog", "dog5": "dog", "dog6": "dog", "dog7": "dog", "dog8": "dog", "duck_toy": "toy", "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal", "monster_toy": "toy", "pink_sunglasses": "glasses", "poop_emoji": "toy",
    "rc_car": "toy", "red_cartoon": "cartoon", "robot_toy": "toy", "shiny_sneaker": "sneaker", "teapot": "teapot", "vase": "vase",
    "wolf_plushie": "stuffed animal",
}  # fmt: skip
LIVE = ("cat", "dog")  # classes that have the prompts of live subjects


def class_of(subject: str) -> str:
    """OmegaConf resolver: the class of a subject, by the name of its folder.

    Raises:
        ValueError: the dataset has no such subject.
    """
    if subject not in CLASSES:
        raise ValueError(f"dataset.subject is {subject!r}, which DreamBench does not have; choose one of {', '.join(CLASSES)}")
    return CLASSES[subject]


def prompts_of(subject: str) -> str:
    """OmegaConf resolver: the name of the prompt library for a subject."""
    return "dreambooth_live" if class_of(subject) in LIVE else "dreambooth_objects"
