"""From SimpleTuner's options to an experiment's text, and what became of each option."""

from __future__ import annotations

import json
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ...config import ConfigError
from .datasets import LYCORIS_DEFAULT, is_lycoris
from .families import built, is_assisted
from .options import OPTIONS
from .others import other
from .values import NoEffect, Options, Refused, Settings, Unsupported

FILES = ("data_backend_config", "lycoris_config", "user_prompt_library", "validation_prompt_library")
FILES_OR_IDS = ("init_lora", "pretrained_model_name_or_path")
REQUIRED = {"model_family": f"add one of {built()}", "model_type": "add lora or full"}
HIDDEN = ("token", "secret", "webhook", "password", "api_key", "aws_")  # values that are not shown
UPWARD = 3  # folders above the configuration's in which a relative path is looked for


class Kind(Enum):
    mapped = "mapped"
    idle = "no meaning here"
    left = "not supported"


class Mapped(NamedTuple):
    option: str
    value: str
    kind: Kind
    here: str  # "" if it is not mapped
    note: str


def translate(options: Options, beside: Path) -> tuple[Settings, list[Mapped]]:
    """What the options say in this project's words, and what became of each.

    Args:
        beside: the folder of the configuration, from which relative paths are looked for.

    Raises:
        ConfigError: this project can't train what is asked for.
    """
    if missing := [name for name in REQUIRED if not options.get(name)]:
        raise ConfigError("\n".join(f"{name} is not set, so it is unknown what to train; {REQUIRED[name]}" for name in missing))
    options = {name: _located(name, value, beside) for name, value in options.items()}
    options = {"model_family": options["model_family"], **options}  # its refusal is told first
    said: Settings = {}
    became: list[Mapped] = []
    refusals: list[str] = []
    for name, value in (options | _implied(options, beside)).items():
        try:
            mine, one = _one(name, value, options)
        except Refused as reason:
            refusals.append(str(reason))
            continue
        said |= mine
        became.append(one)
    if refusals:
        raise ConfigError("this project can't train it:\n" + "\n".join(f"  - {text}" for text in dict.fromkeys(refusals)))
    return said, became


def _implied(options: Options, beside: Path) -> Options:
    """What SimpleTuner takes where the file says nothing, and what must be told then."""
    implied: Options = {}
    if is_lycoris(options) and "lycoris_config" not in options:
        implied["lycoris_config"] = _located("lycoris_config", LYCORIS_DEFAULT, beside)
    if "data_backend_config" not in options:
        implied["data_backend_config"] = None
    try:
        if "disable_assistant_lora" not in options and is_assisted(options):
            implied["disable_assistant_lora"] = False
    except Refused:
        pass  # model_family says why
    return implied


def _one(name: str, value: Any, options: Options) -> tuple[Settings, Mapped]:
    shown = "…" if any(word in name for word in HIDDEN) else json.dumps(value, ensure_ascii=False, default=str)
    option = OPTIONS.get(name) or other(name)
    if option is None:
        near = get_close_matches(name, OPTIONS, n=1)
        hint = f"; the nearest known is {near[0]}" if near else ""
        return {}, Mapped(name, shown, Kind.left, "", f"not known here{hint}")
    try:
        if "${" in str(value) or "{env:" in str(value):
            raise Unsupported("it reads another value or the environment; write the value itself")
        mine = option.say(value, options)
    except NoEffect as reason:
        return {}, Mapped(name, shown, Kind.idle, "", str(reason))
    except Unsupported as reason:
        return {}, Mapped(name, shown, Kind.left, "", str(reason))
    if not mine:
        return {}, Mapped(name, shown, Kind.idle, "", "off")
    here = "\n".join(f"{key.lstrip('/')}={_word(chosen)}" for key, chosen in mine.items())
    return mine, Mapped(name, shown, Kind.mapped, here, option.note)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _located(name: str, value: Any, beside: Path) -> Any:
    """A relative path means the same as to SimpleTuner, from where the program runs; failing that, from beside the file;
    of files also from a folder above it, as config/x.json is meant. What is no file here stays as it is."""
    if name not in (*FILES, *FILES_OR_IDS) or not str(value) or "://" in str(value):
        return value
    place = Path(str(value)).expanduser()
    looked = [place, beside / place]
    if name in FILES:
        above = [beside, *list(beside.resolve().parents)[:UPWARD]]
        looked += [folder / Path(*place.parts[begin:]) for begin in range(len(place.parts)) for folder in above]
    found = next((path for path in looked if path.exists()), None)
    return str(found.resolve()) if found else value


def experiment(said: Settings, name: str, origin: str) -> str:
    """The text of an experiment file."""
    tree = OmegaConf.create({"name": name})
    for key, value in said.items():
        if not key.startswith("/"):
            OmegaConf.update(tree, key, value)
    groups = "".join(f"  - override {key}: {value}\n" for key, value in said.items() if key.startswith("/"))
    head = f"# @package _global_\n# Taken over from SimpleTuner's {origin} by tools.import_simpletuner.\n"
    return head + (f"defaults:\n{groups}\n" if groups else "") + OmegaConf.to_yaml(tree)
