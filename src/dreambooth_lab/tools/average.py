"""Average a run's weights over a length that is chosen after training (post-hoc EMA: Karras et al. 2024, EDM2):

    python -m dreambooth_lab ema.lengths=[0.05,0.1] ...                # keeps snapshots of two averages
    python -m dreambooth_lab.tools.average RUN --length 0.03 --length 0.1 --length 0.2

A length is σ_rel, the relative standard deviation of the average over the steps: 0.1 averages over about a tenth of the training.
The weights of each length are exported to RUN/average_LENGTH. If the run held back images for the eval loss, a table compares the
lengths with the live weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.table import Table

from ..config import ConfigError
from .common import cli

application = cli.app()


@application.command(help=cli.text(__doc__))
def main(
    run: Annotated[Path, typer.Argument(help="the run's folder")],
    length: Annotated[list[float], typer.Option(help="σ_rel, above 0 and at most 0.28; may be repeated")],
    step: Annotated[int | None, typer.Option(help="the step at which the averages end; default: the last")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="where the exports are written; default: RUN")] = None,
) -> None:
    from .. import lab, terminal
    from .averaging import write

    found = lab.load(run)
    if output_dir is not None and output_dir.is_file():
        raise ConfigError(f"--output_dir is {str(output_dir)!r}, which is a file; give a folder")
    rows = write(found, length, step, output_dir or found.folder.root)
    if rows:
        terminal.show(_table(rows))


class Compared(NamedTuple):
    """The eval loss of one kind of weights."""

    name: str
    loss: float
    change: float  # from the live weights
    interval: tuple[float, float]  # of the change, over images; NaN for fewer than three


def _table(rows: list[Compared]) -> Table:
    table = Table(
        "weights", "eval/loss", "change from live", "95 % interval over images", title="Eval loss", title_justify="left"
    )
    for row in rows:
        low, high = row.interval
        known = f"{low:+.5f} to {high:+.5f}" if low == low else "-"
        table.add_row(row.name, f"{row.loss:.5f}", f"{row.change:+.5f}" if row.change else "-", known)
    return table


if __name__ == "__main__":
    cli.run(application)
