"""Short words that are unsuitable as names of a subject, each with its reason."""

from __future__ import annotations

import builtins
import keyword
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

LISTS = Path(__file__).with_name("short_words.txt")
DICTIONARY = Path("/usr/share/dict/words")  # on systems that have one


def known(more: Path | None) -> dict[str, str]:
    """Word → its kind. Lists of this project, Python's own words, the system's dictionary, and a file."""
    found = {word.lower(): "a word of code" for word in (*keyword.kwlist, *dir(builtins), *sys.stdlib_module_names)}
    for path in (DICTIONARY, more):
        lines = path.read_text(encoding="utf-8", errors="replace").split() if path and path.is_file() else []
        found |= {word.lower(): f"in {path}" for word in lines}
    return found | dict(_listed())


def _listed() -> Iterator[tuple[str, str]]:
    reason = ""
    for line in LISTS.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            reason = line[2:]
        else:
            yield from ((word, reason) for word in line.split())


def split(words: Sequence[str], known: dict[str, str]) -> tuple[list[str], dict[str, list[str]]]:
    """Usable words, and reason → unusable ones."""
    good, refused = list[str](), defaultdict[str, list[str]](list)
    for word in words:
        reason = "a single letter or digit" if len(word) == 1 else "a number" if word.isdigit() else known.get(word)
        if reason:
            refused[reason].append(word)
        else:
            good.append(word)
    return good, dict(refused)
