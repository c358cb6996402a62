"""A config.json of SimpleTuner's as an experiment of this project, with a table of what became of each option:

    python -m dreambooth_lab.tools.import_simpletuner config.json        # writes experiments/experiment/<name>.yaml
    python -m dreambooth_lab experiment=<name>

Nothing is left out silently: an option without a counterpart is listed with the reason, an unknown one with the nearest known.
"""

from __future__ import annotations

import argparse
import json
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from .. import lab
from ..config import ConfigError, check, conf_dir
from ..data.simpletuner import first_prompt
from .simpletuner_options import OPTIONS, Left, Options, Said

PLACES = ("dataset.path", "adapter.preset", "adapter.init_from", "validation.library")
HIDDEN = ("token", "secret", "webhook", "password", "api_key")  # values that are not shown


class Became(NamedTuple):
    option: str
    value: str
    here: str  # "" if it was left behind
    note: str


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if what was written still has problems, 2 for a file that is none."""
    parser = argparse.ArgumentParser(prog="python -m dreambooth_lab.tools.import_simpletuner", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, help="the experiment file; experiments/experiment/<name of the config>.yaml")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    options = parser.parse_args(words)
    output = options.output or conf_dir().parent / "experiments/experiment" / f"{_name(options.config)}.yaml"
    try:
        said, became = translate(read(options.config), options.config.parent)
        if output.exists() and not options.force:
            raise ConfigError(f"{str(output)!r} exists already; give --output FILE, or --force to write over it")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(experiment(said, options.config), encoding="utf-8")
    _show(became)
    print(f"written: {output}")
    return _problems(said)


def _name(config: Path) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in config.stem)


def read(path: Path) -> Options:
    """The options of a config.json, with or without their dashes.

    Raises:
        ConfigError: it can't be read, or is no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{str(path)!r} is broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} can't be read ({error}); give SimpleTuner's config.json") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} is no object of options; a list of datasets runs as it is: dataset=simpletuner")
    return {str(key).lstrip("-"): value for key, value in data.items()}


def translate(options: Options, beside: Path) -> tuple[Said, list[Became]]:
    """What the options say in this project's words, and what became of each."""
    said: Said = {}
    became = []
    for name, value in options.items():
        shown = "…" if any(word in name for word in HIDDEN) else json.dumps(value, ensure_ascii=False)
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, n=1)
            became.append(Became(name, shown, "", "not known here" + (f"; the nearest known is {near[0]}" if near else "")))
            continue
        try:
            if "${" in str(value):
                raise Left("it has ${…}, which reads another value or the environment here; say it at the command line")
            mine = OPTIONS[name].say(value, options)
        except Left as reason:
            became.append(Became(name, shown, "", str(reason)))
            continue
        mine |= {key: _located(mine[key], beside) for key in PLACES if key in mine}
        said |= mine
        here = "\n".join(f"{key.lstrip('/')}={value}" for key, value in mine.items())
        became.append(Became(name, shown, here or "(off)", OPTIONS[name].note))
    return said, became


def _located(place: str, beside: Path) -> str:
    """A relative path means the same as to SimpleTuner, from where the program runs; failing that, from beside the file."""
    found = (path for path in (Path(place), beside / place, beside / Path(place).name) if path.exists())
    return str(next(found, Path(place)).resolve()) if not Path(place).is_absolute() else place


def experiment(said: Said, config: Path) -> str:
    """The text of an experiment file."""
    tree = OmegaConf.create({"name": _name(config)})
    for key, value in said.items():
        if not key.startswith("/"):
            OmegaConf.update(tree, key, value)
    groups = "".join(f"  - override {key}: {value}\n" for key, value in said.items() if key.startswith("/"))
    head = f"# @package _global_\n# Taken over from {config.name} of SimpleTuner by tools.import_simpletuner.\n"
    return head + (f"defaults:\n{groups}\n" if groups else "") + OmegaConf.to_yaml(tree)


def _show(became: list[Became]) -> None:
    taken, left = Table(title="Taken over", title_justify="left"), Table(title="Left behind", title_justify="left")
    for table, columns in ((taken, ("option", "here", "note")), (left, ("option", "why"))):
        for column in columns:
            table.add_column(column, overflow="fold")
    for one in became:
        option = f"{one.option} = {one.value}"
        if one.here:
            taken.add_row(option, one.here, one.note)
        else:
            left.add_row(option, one.note)
    for table in (taken, left):
        if table.row_count:
            Console().print(table)


def _problems(said: Said) -> int:
    """Compose and check what was written, and say what is still to be done."""
    words = [f"{key.lstrip('/')}={json.dumps(value, ensure_ascii=False)}" for key, value in said.items()]
    try:
        check(lab.compose(*words))
    except ConfigError as error:
        print(f"still to be done: {error}")
        return 1
    return 0


if __name__ == "__main__":
    OmegaConf.register_new_resolver("run_folder", lambda *_: "", replace=True)
    OmegaConf.register_new_resolver("dataset_file_prompt", first_prompt, replace=True)
    sys.exit(main())
