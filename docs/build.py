"""The documentation's site: `python docs/build.py`, or `make docs`. Needs the extra `docs` and no network.

The pages of `docs/` are copied to `build/docs`. The reference of the keys, the lab log and the changelog are added there from
`conf/`, the schema, `experiments/README.md` and `CHANGELOG.md`, so that no fact has a second copy. Then zensical writes
`build/site`; a link to a page or heading that does not exist ends the build with an error.
"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_type_hints

from dreambooth_lab.config import help
from dreambooth_lab.config.keys import all_keys
from dreambooth_lab.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
STAGED = ROOT / "build" / "docs"
PAGES = {"log.md": "experiments/README.md", "changelog.md": "CHANGELOG.md"}  # page → the file that it shows
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
KEY_LINE = re.compile(
    r"""^(?P<indent>\s*)(?P<name>\w+):\s*(?P<value>(?:"[^"]*"|'[^']*'|[^#"']|(?<!\s)#)*?)\s*(?:#\s?(?P<what>.*))?$"""
)
CONTINUED = re.compile(r"^\s{8,}#\s?(.*)$")


class Line(NamedTuple):
    """What a YAML file says of a key."""

    value: str
    what: str  # its comment; "" for none


def lines_of(text: str) -> dict[str, Line]:
    """Dotted key → its value as written and its comment, of a file of `conf/`."""
    found: dict[str, Line] = {}
    parents: list[tuple[int, str]] = []
    last = ""
    for line in text.splitlines():
        if (more := CONTINUED.match(line)) and last:
            found[last] = found[last]._replace(what=f"{found[last].what} {more[1]}")
        elif said := KEY_LINE.match(line):
            indent = len(said["indent"])
            parents = [*(one for one in parents if one[0] < indent), (indent, said["name"])]
            last = ".".join(name for _, name in parents)
            found[last] = Line(said["value"].strip(), (said["what"] or "").strip())
    return found


def option_lines(group: help.Group, option: str) -> dict[str, Line]:
    """The same for an option, with the options that it begins with; a comment stays where a later file has none."""
    found: dict[str, Line] = {}
    for name in help.built_on(group, option):
        for key, line in lines_of(group.text(name)).items():
            found[key] = Line(line.value, line.what or found.get(key, line).what)
    return found


def log_entries() -> dict[str, str]:
    """Heading of an entry of the lab log → its text."""
    parts = HEADING.split((ROOT / PAGES["log.md"]).read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries_of(key: str, entries: dict[str, str]) -> list[str]:
    """Links to the entries of the lab log that name a key."""
    named = re.compile(rf"(?<![\w.]){re.escape(key)}(?![\w.]\w)")
    return [
        f"[{heading.partition(' · ')[2]}](../log.md#{slug(heading)})" for heading, text in entries.items() if named.search(text)
    ]


def slug(heading: str) -> str:
    """A heading's anchor, as Python-Markdown makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower())


def reference(group: help.Group, entries: dict[str, str]) -> str:
    """A page about a group: its options, then every key."""
    options = {option: option_lines(group, option) for option in group.options}
    rows = [f"| `{one}`{' (default)' if one in chosen(group) else ''} | {_plain(about(group, one))} |" for one in options]
    parts = [f"# {group.name}", f"{_sentence(group.what)} Chosen with `{group.name}=OPTION`.", "## Options"]
    parts += ["\n".join(["| option | what it is |", "|---|---|", *rows])]
    hint = get_type_hints(Config).get(group.name)
    keys = list(all_keys(hint)) if hint else []
    parts += ["## Keys"] * bool(keys)
    for key in keys:
        parts += list(_about_key(group, key, options, entries))
    return "\n\n".join(parts) + "\n"


def chosen(group: help.Group) -> list[str]:
    return [one.strip() for one in group.chosen.split(",")]


def about(group: help.Group, option: str) -> str:
    """The comment with which an option's file begins."""
    lines: list[str] = []
    for line in group.text(option).splitlines():
        if not line.startswith("#"):
            break
        lines += [line.lstrip("# ")] * (not line.startswith("# @"))
    return " ".join(lines)


def _about_key(group: help.Group, key: str, options: dict[str, dict[str, Line]], entries: dict[str, str]) -> Iterator[str]:
    default = chosen(group)[0] if chosen(group)[0] in options else next(iter(options))
    line = options[default].get(key, Line("", ""))
    what = line.what or next((of[key].what for of in options.values() if key in of and of[key].what), "")
    kind = help.typed(f"{group.name}.{key}").partition(": ")[2]
    yield f"### {group.name}.{key} {{ #{group.name}.{key} }}"
    yield f"*{_plain(kind)}*" + (f"; default `{line.value}`" if line.value not in ("", "???") else "")
    if what:
        yield _plain(what)
    values = {name: of[key].value for name, of in options.items() if key in of and of[key].value not in ("", line.value)}
    if values:
        yield "Other options: " + ", ".join(f"`{group.name}={name}` `{value}`" for name, value in values.items())
    if links := entries_of(f"{group.name}.{key}", entries):
        yield "In the lab log: " + "; ".join(links)


def _plain(text: str) -> str:
    """Text of a comment, none of it markup."""
    return re.sub(r"([|*_\[\]`~])", r"\\\1", html.escape(text, quote=False))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")")) else ".")


def top_keys() -> str:
    """The page of the keys outside of groups."""
    parts = ["# Keys outside of groups"]
    for key, line in lines_of("\n".join(help.top_lines())).items():
        kind = help.typed(key).partition(": ")[2]
        parts += [f"### {key} {{ #{key} }}", f"*{_plain(kind)}*; default `{line.value}`", _plain(line.what)]
    return "\n\n".join(parts) + "\n"


def overview() -> str:
    """The first page of the reference."""
    rows = []
    for group in help.groups().values():
        options = " ".join(f"`{one}`" for one in group.options)
        rows.append(f"| [{group.name}]({group.name}.md) | {_plain(group.what)} | {options} |")
    said = (
        "# Reference of every key\n\nMade from `conf/` and the schema when this site is built. "
        "`python -m dreambooth_lab --help GROUP` prints the same for one group. A key is set as `group.key=value`, "
        "an option is chosen with `group=option`. Numbers have ranges (`config/ranges.py`); infinities and NaN are in none. "
        "[Keys outside of groups](run.md) have no group before their name.\n\n"
    )
    return said + "\n".join(["| group | what it decides | options |", "|---|---|---|", *rows]) + "\n"


def shown(source: str) -> str:
    """A Markdown file of the repository as a page of the site: its links as seen from there."""
    text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](").replace("](../docs/", "](")
    return re.sub(r"(?<![\w/(`])docs/((?:\w+/)+\w+\.png)", r"[\1](\1)", text)


def stage(folder: Path) -> Path:
    """Every page of the site, in a folder that is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page, source in PAGES.items():
        (folder / page).write_text(shown(source), encoding="utf-8")
    entries, inside = log_entries(), folder / "reference"
    inside.mkdir()
    for group in help.groups().values():
        (inside / f"{group.name}.md").write_text(reference(group, entries), encoding="utf-8")
    (inside / "run.md").write_text(top_keys(), encoding="utf-8")
    (inside / "index.md").write_text(overview(), encoding="utf-8")
    return folder


def main() -> int:
    """Exit code of the site's generator, which is strict."""
    stage(STAGED)
    return subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
