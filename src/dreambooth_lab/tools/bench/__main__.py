"""What a training step of your own configuration costs:

    python -m dreambooth_lab.tools.bench model=sdxl dataset.path=photos …           # measured on this machine
    python -m dreambooth_lab.tools.bench --plan model=sdxl adapter.rank=16 …        # counted, for cards you don't have

The words are those of a training run. `--plan` reads a checkpoint's settings, not its weights: it runs forward and backward of
the denoiser on tensors without values, counts operations, bytes and memory, and gives the least time that these take on cards (a
roofline: 60 % of the peak arithmetic, 80 % of the bandwidth, 2 µs a kernel). Beside it stands the same LoRA as diffusers'
training scripts run it: float32 factors under autocast.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..common import cli

app = cli.app(help=__doc__)
GIB = 2**30


@app.command()
def bench(
    words: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE …, as for a training run.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Count on tensors without values instead of measuring.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to time.")] = 20,
    against_autocast: Annotated[
        bool, typer.Option("--against-autocast", help="Also time the LoRA as diffusers' training scripts run it.")
    ] = False,
    side: Annotated[
        int | None, typer.Option(min=8, help="--plan: pixels of a square image; model.resolution if left out.")
    ] = None,
) -> None:
    """What a training step of your own configuration costs."""
    if plan:
        _plan(words or [], side)
    else:
        _measure(words or [], steps, against_autocast)


def _measure(words: list[str], steps: int, against_autocast: bool) -> None:
    from ..common.training_config import compose_checked
    from .measured import measure

    cfg = compose_checked(words)
    found = measure(cfg, steps, against_autocast)
    table = Table("measured", "", title=f"{cfg.model.pretrained}, batch {found.rows}, {steps} steps", title_justify="left")
    low, high = found.spread
    table.add_row("step", f"{found.step * 1e3:.1f} ms (median; {low * 1e3:.1f} to {high * 1e3:.1f})")
    table.add_row("steps / s", f"{1 / found.step:.2f}")
    table.add_row("images / s", f"{found.rows / found.step:.2f}")
    table.add_row("outside the denoiser", f"{max(1 - found.denoiser / found.step, 0):.0%} of the step")
    if found.autocast:
        ratio = f"{found.denoiser / found.autocast:.2f} of autocast's {found.autocast * 1e3:.1f} ms"
        table.add_row("denoiser, both passes", f"{found.denoiser * 1e3:.1f} ms: {ratio}")
    table.add_row("denoiser", f"{found.flops / found.step / 1e12:.3f} TFLOP/s")
    table.add_row("share of the card's peak", "not known for this device" if found.share is None else f"{found.share:.1%}")
    table.add_row("peak memory", f"{found.memory / GIB:.2f} GiB")
    Console().print(table)


def _plan(words: list[str], side: int | None) -> None:
    from ... import lab
    from .meter import CARDS
    from .plan import analyse

    cfg = lab.compose("trainer.accelerator=cpu", *words)
    rows, side = cfg.dataset.batch_size, side or cfg.model.resolution
    ours = analyse(cfg, rows, side)
    arms = [ours] + ([analyse(cfg, rows, side, as_peers=True)] if cfg.adapter.algorithm == "lora" else [])
    names = ["this project", "autocast, as diffusers' scripts", "ratio"][: 2 * len(arms) - 1]
    title = (
        f"{cfg.model.pretrained}, batch {rows}, {side} × {side} px, {ours.layers} layers, {ours.learning / 1e6:.1f} M learning"
    )
    table = Table("forward and backward of the denoiser", *names, title=title, title_justify="left")

    def row(what: str, values: list[float], unit: str) -> None:
        ratio = [f"{values[0] / values[1]:.2f}"] if len(values) > 1 else []
        table.add_row(what, *(f"{value:,.2f} {unit}" for value in values), *ratio)

    row("frozen weights", [arm.frozen / GIB for arm in arms], "GiB")
    row("kept for backward", [arm.saved / GIB for arm in arms], "GiB")
    row("most beside the weights", [arm.meter.peak / GIB for arm in arms], "GiB")
    row("arithmetic", [arm.meter.flops.total() / 1e12 for arm in arms], "TFLOP")
    row("bytes moved", [arm.meter.moved.total() / 1e9 for arm in arms], "GB")
    for card in CARDS:
        row(f"least time, {card.name}", [arm.meter.seconds[card.name] * 1e3 for arm in arms], "ms")
    Console().print(table)


def main(words: list[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: app(words))


if __name__ == "__main__":
    main()
