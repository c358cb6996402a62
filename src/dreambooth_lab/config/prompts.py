"""What prompts are made of: words, the rare one among them, and libraries of prompts."""

from __future__ import annotations

import re


def words(text: str) -> list[str]:
    """As CLIP's tokenizer parts them before it looks for pieces: lower case, letters together, each digit alone."""
    return re.findall(r"[^\W\d_]+|\d", text.lower())


def rare_word(instance_prompt: str, class_prompt: str | None) -> str | None:
    """The one word that the instance prompt has and the class prompt lacks; None if there is not exactly one.

    Articles differ for grammar's sake ("sks dog", "a dog") and don't count.
    """
    known = {*words(class_prompt or ""), "a", "an", "the"}
    rare = {word for word in words(instance_prompt) if word not in known}
    return rare.pop() if class_prompt and len(rare) == 1 else None
