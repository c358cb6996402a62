"""Help for the command line: a short page of first steps, the list of groups, and single groups and keys with their comments.

Everything except the first page is read from `conf/`, where every key has a comment.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml

from .check import ConfigError
from .compose import conf_dir
from .keys import kind_of, nearest

START = """\
dreambooth-lab: teach a text-to-image model one subject from a few photos

Run the demo, without a GPU or a download, in about two minutes:
  python -m dreambooth_lab experiment=demo

Train on your photos, a folder of 3 to 30; a rare word such as ohwx names the subject:
  python -m dreambooth_lab model=sdxl dataset.path=PHOTOS 'dataset.instance_prompt=a photo of ohwx dog'
      … memory=auto      choose memory-saving options for this GPU, or for a size: memory=16gb
      … preflight=only   check, show captions, crops and memory, and stop before training
      … -m optimizer.lr=1e-4,3e-4      one run for each value
      … sweep=prior    several runs, and a page that compares them

Resume after a stop, and generate images with the result:
  python -m dreambooth_lab resume=latest
  python -m dreambooth_lab.tools.generate run=runs/RUN 'prompt=a photo of ohwx dog in the snow'

More:
  python -m dreambooth_lab --help               the groups of keys and their options
  python -m dreambooth_lab --help optimizer     one group; also model=flux or trainer.max_steps
  python -m dreambooth_lab … --cfg job          print the whole configuration without running
  eval "$(dreambooth-lab -sc install=bash)"     completion in this shell; or zsh, fish
"""
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
ASKS = ("--help", "-h")
PARTED = re.compile(r"^  - (?P<group>\w+): *(?P<option>[^#]*?) *# (?P<what>.*)$", re.MULTILINE)


class Group(NamedTuple):
    name: str
    chosen: str  # in conf/config.yaml
    what: str  # its comment

    @property
    def folder(self) -> Path:
        inside = conf_dir() / self.name
        return inside if inside.is_dir() else conf_dir().parent / "experiments" / self.name

    @property
    def options(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.yaml"))

    def text(self, option: str) -> str:
        return (self.folder / f"{option}.yaml").read_text(encoding="utf-8")


def page(words: Sequence[str]) -> str | None:
    """The help for a command line; None if it has no --help.

    Raises:
        ConfigError: there is no such group, option or key.
    """
    if not words:
        return START
    if not any(word in ASKS for word in words):
        return None
    asked = [word for word in words if not word.startswith("-")]
    return "\n".join(_about(word) for word in asked) if asked else f"{START}\n{_overview()}"


def groups() -> dict[str, Group]:
    """The groups of conf/config.yaml, in their order."""
    found = PARTED.finditer((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    return {one["group"]: Group(one["group"], one["option"].strip("[]"), one["what"]) for one in found}


def _overview() -> str:
    width = _width()
    lines = ["Groups, chosen with group=option; * marks the default:"]
    for group in groups().values():
        options = " ".join(f"{one}*" if one == group.chosen else one for one in group.options)
        lines.append(textwrap.fill(f"{group.name:<11}{group.what}", width, initial_indent="  ", subsequent_indent=" " * 13))
        lines.append(textwrap.fill(options, width, initial_indent=" " * 13, subsequent_indent=" " * 13))
    return "\n".join([*lines, "", "Keys outside of groups:", *(f"  {line}" for line in top_lines()), ""])


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120)


def top_lines() -> list[str]:
    """The keys of conf/config.yaml outside of groups, with their continuation lines."""
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8")
    return text[text.index("\nname:") : text.index("\nhydra:")].strip().splitlines()


def _about(word: str) -> str:
    """A group, an option of one (`group=option`), or a key."""
    name, _, option = word.partition("=")
    known = groups()
    if name in known:
        return _about_group(known[name], option)
    if kind_of(name) is not None and not option:
        return _about_key(name, known)
    near = nearest(name) if "." in name else get_close_matches(name, known, n=1) or nearest(name)
    raise ConfigError(f"--help {word}: no such group or key" + (f"; did you mean {' or '.join(near)}?" if near else ""))


def _about_group(group: Group, option: str) -> str:
    if option and option not in group.options:
        near = get_close_matches(option, group.options, n=1) or group.options
        raise ConfigError(f"--help {group.name}={option}: no such option; choose from {', '.join(near)}")
    lines = [f"{group.name}: {group.what}", "", f"Options, chosen with {group.name}=…; * marks the default:"]
    for name in group.options if not option else []:
        mark = f"{name}{'*' if name == group.chosen else ''}"
        lines.append(textwrap.shorten(f"  {mark:<20}{_first_comment(group.text(name))}", _width(), placeholder=" …"))
    shown = option or (group.chosen if group.chosen in group.options else group.options[0])
    lines = lines[:1] if option else lines
    for name in built_on(group, shown):
        lines += ["", f"{group.name}={name} has these keys, set as {group.name}.KEY=VALUE:", "", group.text(name).rstrip()]
    return "\n".join([*lines, ""])


def built_on(group: Group, option: str) -> list[str]:
    """An option with the options of its group that it inherits from, the base first."""
    content: Any = yaml.safe_load(group.text(option)) or {}
    before = [one for one in content.get("defaults", []) if isinstance(one, str) and one in group.options]
    return [*(earlier for one in before for earlier in built_on(group, one)), option]


def _first_comment(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("# @")]
    return lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""


def _about_key(key: str, known: dict[str, Group]) -> str:
    group, _, inside = key.partition(".")
    if group not in known:
        lines = top_lines()
        return "\n".join([typed(key), *_lines_of(key, lines), ""])
    chosen = known[group].chosen
    names = built_on(known[group], chosen) if chosen in known[group].options else known[group].options
    found = [_lines_of(inside.split(".")[-1], known[group].text(name).splitlines()) for name in names]
    shown = next((lines for lines in reversed(found) if lines), [f"see --help {group}"])
    return "\n".join([typed(key), *shown, ""])


def _lines_of(name: str, lines: Sequence[str]) -> list[str]:
    """A key's line with its continuation lines."""
    for place, line in enumerate(lines):
        if re.match(rf"\s*{re.escape(name)}:", line):
            more = next((i for i, after in enumerate(lines[place + 1 :]) if not re.match(r"\s{8,}#", after)), len(lines))
            return list(lines[place : place + 1 + more])
    return []


def typed(key: str) -> str:
    """A key with its type, or its choices."""
    kind = kind_of(key)
    may_be_null = type(None) in get_args(kind)
    inside = next(one for one in get_args(kind) if one is not type(None)) if may_be_null else kind
    if isinstance(inside, type) and issubclass(inside, Enum):
        prefix = "one of " + ", ".join(one.name for one in inside)
    else:
        prefix = TYPES.get(inside) or (
            "a list" if get_origin(inside) is list else "a mapping" if get_origin(inside) is dict else "a value"
        )
    return f"{key}: {prefix}" + (", or null" if may_be_null else "")
