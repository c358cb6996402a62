"""What several runs say together, on one page that works offline:

    python -m dreambooth_lab.tools.compare runs/SWEEP                       # compare.html in the sweep's folder
    python -m dreambooth_lab.tools.compare runs/A runs/B --out compared     # of any runs

Runs that differ in their seed alone are one arm. The page says what differs between the arms and what can be concluded of each
number (paired by seed, 95 % intervals, Holm's correction), and shows curves with bands, pictures of the same prompt and noise
side by side, and cost. The same numbers are in compare.csv and differences.csv, and as Parquet.
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
    out: Annotated[Path | None, typer.Option(help="folder to write into; of one place, that place")] = None,
    reference: Annotated[str | None, typer.Option(help="arm to compare with: a part of its name; the first")] = None,
) -> None:
    if out is None and len(places) > 1:
        raise ConfigError(f"{len(places)} places were given; say with --out which folder the page goes to")
    page = compare.write(places, out or places[0], reference)
    if page is None:
        print("no run there has come to its end yet, so there is nothing to compare")
        raise typer.Exit(1)
    print(page)


if __name__ == "__main__":
    cli.run(application)
