"""Compare several runs on one page that works offline:

    python -m dreambooth_lab.tools.compare runs/SWEEP                       # compare.html in the sweep's folder
    python -m dreambooth_lab.tools.compare runs/A runs/B --out compared     # of any runs
    python -m dreambooth_lab.tools.compare runs/SWEEP --average dataset.subject

Runs that differ only in their seed form one arm. With `--average dataset.subject` an arm also has runs of several subjects: each
seed's metrics are means over them, and a seed that lacks a subject is left out. The page lists the differing keys and the
conclusions for each metric (paired by seed, 95 % intervals, Holm's correction), and shows likeness against drift with the Pareto
front, curves with bands, images of the same prompt and noise side by side, and cost. The same data are in compare.csv and
differences.csv, and as Parquet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import compare
from ..config import ConfigError
from .common import cli

application = cli.app()


@application.command(help=cli.text(__doc__))
def main(
    places: Annotated[list[Path], typer.Argument(help="folders of runs or of sweeps", metavar="FOLDER …")],
    out: Annotated[Path | None, typer.Option(help="output folder; default for a single folder: that folder")] = None,
    average: Annotated[list[str] | None, typer.Option(help="a key to average over, such as dataset.subject")] = None,
    reference: Annotated[str | None, typer.Option(help="the reference arm: a part of its name; default: the first")] = None,
) -> None:
    if out is None and len(places) > 1:
        raise ConfigError(f"{len(places)} folders were given; set the output folder with --out")
    page = compare.write(places, out or places[0], reference, average or ())
    if page is None:
        print("no run has finished yet, so there is nothing to compare")
        raise typer.Exit(1)
    print(page)


if __name__ == "__main__":
    cli.run(application)
