"""Prompts: their words, the rare word, and libraries of prompts."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ARTICLES = ("a", "an", "the")
RARE = "ohwx"  # proposed as the subject's word
BUILT_IN = Path(__file__).resolve().parents[1] / "prompts"


def words(text: str) -> list[str]:
    """Words as CLIP's tokenizer splits them before byte-pair encoding: lower case, letters together, single digits."""
    return re.findall(r"[^\W\d_]+|\d", text.lower())


def rare_word(instance_prompt: str, class_prompt: str | None) -> str | None:
    """The one word that the instance prompt has and the class prompt lacks; None if there is not exactly one.

    Articles may differ ("sks dog", "a dog") and are ignored.
    """
    known = {*words(class_prompt or ""), *ARTICLES}
    rare = {word for word in words(instance_prompt) if word not in known}
    return rare.pop() if class_prompt and len(rare) == 1 else None


def proposal(class_prompt: str | None) -> str:
    """A proposed instance prompt: the class prompt with the rare word before its noun."""
    *before, noun = (class_prompt or "a photo of a dog").split()
    return " ".join([*(before[:-1] if before and before[-1] in ARTICLES else before), RARE, noun])


class Subject:
    """Classifies prompts as being about the subject or about its class.

    A prompt with the rare word is about the subject, whatever else it shares with the instance prompt. If the rare word
    is unknown (`rare` is empty), only a prompt that contains the whole instance prompt is. A prompt with the class prompt's last
    word, its noun, and no word that could be the rare one is about the class. Others are about neither.

    Args:
        token: the rare word, if it is set (`adapter.token`); None: the word of the instance prompt that the class prompt lacks.
    """

    def __init__(self, instance_prompt: str, class_prompt: str | None, token: str | None):
        self.instance, known = words(instance_prompt), words(class_prompt or "")
        self.rare = words(token or rare_word(instance_prompt, class_prompt) or "")
        self.noun = known[-1:]
        self.doubtful = set() if self.rare else {*self.instance} - {*known, *ARTICLES}

    def is_subject(self, prompt: str) -> bool:
        return contains_phrase(prompt, self.rare or self.instance)

    def is_class(self, prompt: str) -> bool:
        return contains_phrase(prompt, self.noun) and not self.is_subject(prompt) and not self.doubtful & {*words(prompt)}


def class_prompt_of(prompt: str, instance_prompt: str, class_prompt: str | None, token: str | None) -> str | None:
    """The same prompt about the class: without the rare word, and with the class prompt's article. None if it lacks the word."""
    rare = token or rare_word(instance_prompt, class_prompt)
    if rare is None or not contains_phrase(prompt, words(rare)):
        return None
    before = (class_prompt or "").lower().split()[-2:-1]
    article = f"{before[0]} " if before and before[0] in ARTICLES else ""
    return re.sub(rf"\b(?:(?:{'|'.join(ARTICLES)})\s+)?{re.escape(rare)}\b\s*", article, prompt, flags=re.IGNORECASE)


def contains_phrase(prompt: str, phrase: list[str]) -> bool:
    """Whether a prompt contains these words in sequence; False for no words."""
    prompt_words, n = words(prompt), len(phrase)
    return n > 0 and any(prompt_words[i : i + n] == phrase for i in range(len(prompt_words) - n + 1))


def library(place: str, instance_prompt: str, class_prompt: str | None) -> list[str]:
    """The prompts of a library for the run's subject.

    Args:
        place: a built-in one by name, or a YAML or JSON file: a list of prompts, or names with prompts. In them {subject} is the
            rare word with what follows it ("sks dog"), {class} only what follows it ("dog").

    Raises:
        ValueError: the message names the problem and a fix.
    """
    prompts = _read(place)
    rare = rare_word(instance_prompt, class_prompt)
    found = re.search(rf"\b{rare}\b(.*)", instance_prompt, re.IGNORECASE) if rare else None
    if found is None and any("{subject}" in prompt or "{class}" in prompt for prompt in prompts):
        prefix = f"the rare word of dataset.instance_prompt={instance_prompt!r} can't be identified"
        raise ValueError(f"{prefix}; set dataset.class_prompt to the same prompt without it")
    subject, kind = (found[0].strip(), found[1].strip()) if found else ("", "")
    return [prompt.replace("{subject}", subject).replace("{class}", kind) for prompt in prompts]


def _read(place: str) -> list[str]:
    names = sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    path = BUILT_IN / f"{place}.yaml" if place in names else Path(place).expanduser()
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        prefix = " ".join(str(error).split())
        raise ValueError(f"it can't be read ({prefix}); give {', '.join(names)}, or a YAML or JSON file") from error
    prompts = list(held.values()) if isinstance(held, dict) else held
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError("it must contain a list of prompts, or names with prompts")
    return prompts


def prompts_of(place: str | None, instance_prompt: str, class_prompt: str | None) -> list[str]:
    """OmegaConf resolver `prompt_library`: a library's prompts, or only the instance prompt; `check` reports errors."""
    try:
        return library(place, instance_prompt, class_prompt) if place else [instance_prompt] if instance_prompt else []
    except ValueError:
        return []
