"""From SimpleTuner's options to an experiment's text, and the result for each option."""

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
UPWARD = 3  # parent folders of the configuration's in which a relative path is searched


class Kind(Enum):
    mapped = "mapped"
    idle = "no effect here"
    left = "not supported"


class Mapped(NamedTuple):
    option: str
    value: str
    kind: Kind
    here: str  # "" if it is not mapped
    note: str


def translate(options: Options, beside: Path) -> tuple[Settings, list[Mapped]]:
    """This project's settings for the options, and the result for each option.

    Args:
        beside: the folder of the configuration, for relative paths.

    Raises:
        ConfigError: this project does not support the training.
    """
    if missing := [name for name in REQUIRED if not options.get(name)]:
        raise ConfigError("\n".join(f"{name} is not set, but required; {REQUIRED[name]}" for name in missing))
    options = {name: _located(name, value, beside) for name, value in options.items()}
    options = {"model_family": options["model_family"], **options}  # its refusal comes first
    settings: Settings = {}
    became: list[Mapped] = []
    refusals: list[str] = []
    for name, value in (options | _implied(options, beside)).items():
        try:
            mine, one = _one(name, value, options)
        except Refused as reason:
            refusals.append(str(reason))
            continue
        settings |= mine
        became.append(one)
    if refusals:
        raise ConfigError("this project can't train it:\n" + "\n".join(f"  - {text}" for text in dict.fromkeys(refusals)))
    return settings, became


def _implied(options: Options, beside: Path) -> Options:
    """SimpleTuner's defaults for missing options that need a notice."""
    implied: Options = {}
    if is_lycoris(options) and "lycoris_config" not in options:
        implied["lycoris_config"] = _located("lycoris_config", LYCORIS_DEFAULT, beside)
    if "data_backend_config" not in options:
        implied["data_backend_config"] = None
    try:
        if "disable_assistant_lora" not in options and is_assisted(options):
            implied["disable_assistant_lora"] = False
    except Refused:
        pass  # the result of model_family has the reason
    return implied


def _one(name: str, value: Any, options: Options) -> tuple[Settings, Mapped]:
    shown = "…" if any(word in name for word in HIDDEN) else json.dumps(value, ensure_ascii=False, default=str)
    option = OPTIONS.get(name) or other(name)
    if option is None:
        near = get_close_matches(name, OPTIONS, n=1)
        hint = f"; the most similar known one is {near[0]}" if near else ""
        return {}, Mapped(name, shown, Kind.left, "", f"unknown option{hint}")
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
    """Resolve a relative path like SimpleTuner, from the working directory; else from the configuration's folder;
    for files also from a parent folder, for paths such as config/x.json. Other values are not changed."""
    if name not in (*FILES, *FILES_OR_IDS) or not str(value) or "://" in str(value):
        return value
    place = Path(str(value)).expanduser()
    looked = [place, beside / place]
    if name in FILES:
        above = [beside, *list(beside.resolve().parents)[:UPWARD]]
        looked += [folder / Path(*place.parts[begin:]) for begin in range(len(place.parts)) for folder in above]
    found = next((path for path in looked if path.exists()), None)
    return str(found.resolve()) if found else value


def experiment(settings: Settings, name: str, origin: str) -> str:
    """The text of an experiment file."""
    tree = OmegaConf.create({"name": name})
    for key, value in settings.items():
        if not key.startswith("/"):
            OmegaConf.update(tree, key, value)
    groups = "".join(f"  - override {key}: {value}\n" for key, value in settings.items() if key.startswith("/"))
    head = f"# @package _global_\n# Imported from SimpleTuner's {origin} by tools.import_simpletuner.\n"
    return head + (f"defaults:\n{groups}\n" if groups else "") + OmegaConf.to_yaml(tree)
