"""`python -m dreambooth_lab.tools.import_simpletuner config.json`: SimpleTuner's configuration as an experiment.

Reads config.json, config.toml or config.env and writes imported/experiment/NAME.yaml beside it, then prints the command that runs
it, and the result for each option: mapped, without effect here, or not supported. Exits with 1 if something is not supported or
has to be set by hand, with 2 if this project does not support the training; then nothing is written.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ... import lab
from ...config import ConfigError, check, resolve_paths
from ...data.planning import plan
from ...storage.durable import write_text
from ..common import cli
from .read import read
from .translate import Kind, Mapped, experiment, translate

GROUP = "experiment"  # the folder in which Hydra looks for experiments
OWN = "imported"  # contains nothing else: Hydra takes every sibling folder for a group of options, so cache/ for cache=…
KEYS = ("cache", "runs", "name", "seed", "resume", "preflight")  # top-level keys of a run
PACKAGE = Path(__file__).resolve().parents[2]

application = cli.app()


@application.command(help=__doc__)
def main(
    config: Annotated[Path, typer.Argument(help="config.json, config.toml or config.env", show_default=False)],
    multidatabackend: Annotated[Path | None, typer.Option(help="the dataset file, instead of data_backend_config")] = None,
    lycoris_config: Annotated[Path | None, typer.Option(help="LyCORIS' file, instead of lycoris_config")] = None,
    output: Annotated[Path | None, typer.Option(help="the file to write: FOLDER/experiment/NAME.yaml")] = None,
    force: Annotated[bool, typer.Option(help="overwrite an existing file")] = False,
) -> None:
    options = read(config)
    if multidatabackend is not None:
        options["data_backend_config"] = _file(multidatabackend, "--multidatabackend")
    if lycoris_config is not None:
        options |= {"lora_type": "lycoris", "lycoris_config": _file(lycoris_config, "--lycoris_config")}
    target = _target(config, output, force)
    settings, became = translate(options, config.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, experiment(settings, target.stem, config.name))
    _show(became)
    print(f"written: {target}\nrun it:  {command(target)}")
    remaining = problems(target)
    if remaining:
        print(f"still to be set by hand: {remaining}")
    if remaining or any(one.kind is Kind.left for one in became):
        raise typer.Exit(1)


def _file(path: Path, option: str) -> str:
    if not path.expanduser().is_file():
        raise ConfigError(f"{option} is {str(path)!r}, which is not a file; give the JSON file")
    return str(path.expanduser().resolve())


def _target(config: Path, output: Path | None, force: bool) -> Path:
    """The file to write.

    Raises:
        ConfigError: Hydra would not find it there, it belongs to an installed package, or it exists.
    """
    target = (output or config.parent / OWN / GROUP / f"{_name(config)}.yaml").expanduser().resolve()
    if target.parent.name != GROUP or target.suffix != ".yaml":
        way_out = target.parent / GROUP / f"{target.stem}.yaml"
        raise ConfigError(f"--output is {str(output)!r}, where Hydra finds no experiment; give {str(way_out)!r}")
    if target.is_relative_to(PACKAGE):
        raise ConfigError(f"the experiment would be {str(target)!r}, inside the installed package; give another --output")
    if taken := [key for key in KEYS if (target.parents[1] / key).is_dir()]:
        beside = target.parents[1] / OWN / GROUP / target.name
        raise ConfigError(
            f"--output is {str(output)!r}, beside a folder that Hydra would use for {taken[0]}=…; give {str(beside)!r}"
        )
    if not target.stem.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(
            f"--output is {str(output)!r}, which becomes the name of runs; only letters, digits, - and _ are allowed"
        )
    if target.exists() and not force:
        raise ConfigError(
            f"{str(target)!r} exists already; give --output FOLDER/experiment/NAME.yaml, or --force to overwrite it"
        )
    return target


def _name(config: Path) -> str:
    """The file's name, or its folder's if the file is called config."""
    folder = config.resolve().parent.name
    name = folder if config.name.split(".")[0] in ("config", "") and folder else config.stem
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def command(target: Path) -> str:
    """How to run a written experiment."""
    return f"python -m dreambooth_lab --config-dir {shlex.quote(str(target.parents[1]))} experiment={target.stem}"


def problems(target: Path) -> str:
    """Problems of a written experiment; "" if there are none."""
    where = json.dumps(f"file://{target.parents[1]}", ensure_ascii=False)
    try:
        cfg = resolve_paths(lab.compose(f"experiment={target.stem}", f"hydra.searchpath=[{where}]"))
        check(cfg)
        plan(cfg)
    except ConfigError as error:
        return str(error)
    return ""


def _show(became: list[Mapped]) -> None:
    columns = {Kind.mapped: ("option", "here", "note"), Kind.idle: ("option", "why"), Kind.left: ("option", "why")}
    for kind, heads in columns.items():
        table = Table(title=kind.value.capitalize(), title_justify="left")
        for head in heads:
            table.add_column(head, overflow="fold")
        for one in (one for one in became if one.kind is kind):
            option = f"{one.option} = {one.value}"
            table.add_row(*((option, one.here, one.note) if kind is Kind.mapped else (option, one.note)))
        if table.row_count:
            Console().print(table)


if __name__ == "__main__":
    cli.run(application)
