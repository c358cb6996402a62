"""Converts command-line arguments as typed to Hydra's grammar.

The value of a key with text or a path is taken from the shell unchanged: spaces, quotes, brackets, commas and `~` need only
the shell's quotes. A value that is also quoted for Hydra is not changed, and `${key}` still refers to another
key. In a sweep, commas outside of quotes and brackets separate the values, as in Hydra.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from .check import ConfigError
from .keys import kind_of
from .migrations import migrate_word

QUOTED = r"""\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*"""
SWEEP = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(.*\)", re.DOTALL)  # Hydra's functions
WORD = re.compile(r"([+]{0,2})([\w.]+)=(.*)", re.DOTALL)
MANY = {"-m", "--multirun", "hydra.mode=MULTIRUN"}


def as_hydra_reads(words: Sequence[str]) -> list[str]:
    """Convert all arguments of a command line, including options.

    Raises:
        ConfigError: an argument seems to belong to the previous one.
    """
    sweeps = bool(MANY & set(words))
    _refuse_torn(words)
    return _with_own_photos([word if word.startswith("-") else _word(migrate_word(word), sweeps) for word in words])


def _with_own_photos(words: list[str]) -> list[str]:
    """Add dataset=folder if dataset.path is set without a dataset group, so that the shipped dataset's prompts are not used."""
    keys = {word.partition("=")[0] for word in words}
    return [*words, "dataset=folder"] if "dataset.path" in keys and not keys & {"dataset", "experiment", "resume"} else words


def quoted(text: str) -> str:
    """Quote a text for Hydra's grammar; references to other keys are not changed."""
    plain = re.sub(r"(\\*)\$\{(?![^{}$\s]+\})", r"\1\1\\${", text)
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), plain) + '"'


def _word(word: str, sweeps: bool) -> str:
    parts = WORD.fullmatch(word)
    if parts is None:
        return word
    kind, value = kind_of(parts[2]), parts[3]
    if kind in (str, str | None):
        return f"{parts[1]}{parts[2]}={_text(value, sweeps)}"
    if kind == list[str]:
        return f"{parts[1]}{parts[2]}={_texts(value, sweeps)}"
    return word


def _text(value: str, sweeps: bool) -> str:
    if value == "null" or re.fullmatch(f"{QUOTED}(,{QUOTED})*", value, re.DOTALL):
        return value
    if not sweeps:
        return quoted(value)
    return value if SWEEP.fullmatch(value) and _is_hydras(value) else ",".join(_each(value))


def _texts(value: str, sweeps: bool) -> str:
    """A list of texts, or a single text."""
    bare = value.strip()
    if bare in ("null", "[]") or (bare.startswith(("[", "${")) and _is_hydras(value)):
        return value
    if bare.startswith("[") and bare.endswith("]"):
        return f"[{','.join(_each(bare[1:-1]))}]"
    return f"[{_text(value, sweeps=False)}]" if not (sweeps and SWEEP.fullmatch(value)) else value


def _each(value: str) -> list[str]:
    """Comma-separated texts, each quoted."""
    return [one if re.fullmatch(QUOTED, one) else quoted(one.strip()) for one in _parts(value)]


def _parts(value: str) -> Iterator[str]:
    """Split at commas outside of quotes and closed brackets."""
    while True:
        start = re.match(f"{QUOTED}(?=,|$)", value, re.DOTALL)
        end = start.end() if start else _comma(value)
        yield value[:end]
        if end >= len(value):
            return
        value = value[end + 1 :]


def _comma(value: str) -> int:
    """The position of the first comma outside of brackets; of the first comma, if a bracket is not closed."""
    depth = 0
    for place, letter in enumerate(value):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            return place
    first = value.find(",")
    return len(value) if depth == 0 or first < 0 else first


def _is_hydras(value: str) -> bool:
    """Whether Hydra's grammar accepts it unchanged."""
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def _refuse_torn(words: Sequence[str]) -> None:
    """Refuse a value with spaces that the shell split, and show it in quotes."""
    for place, (before, word) in enumerate(pairwise(words), 1):
        parts = WORD.fullmatch(before)
        if parts is None or "=" in word or word.startswith(("-", "~")) or kind_of(parts[2]) not in (str, str | None, list[str]):
            continue
        rest = [one for one in words[place:] if not one.startswith("-")]
        ends = next((i for i, one in enumerate(rest) if WORD.fullmatch(one)), len(rest))
        whole = shlex.quote(" ".join([before, *rest[:ends]]))
        raise ConfigError(f"{word!r} is a separate argument; if it belongs to {parts[2]}, put quotes around both: {whole}")
