"""`python -m dreambooth_lab.tools.lora inspect|convert|resize|merge|bake …`: inspect, convert and combine LoRA files.

Reads exports of this project and files of diffusers, kohya's sd-scripts, peft (folders) and ai-toolkit; safetensors only.
Writes diffusers' layout (a file), kohya's (a file, for ComfyUI, A1111 and Forge) or peft's (a folder). In written
files the scale is folded into B and alpha is the rank (kohya: the most common one), the same update for every reader.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..adapter import layouts
from ..adapter.factors import Parts, cut, merged, squared_distance, squared_norm
from ..adapter.files import File, block_of, read
from ..adapter.timed_rank import without_schedule
from ..config import ConfigError
from ..storage.durable import atomic_folder
from .common import cli

LONG = 100  # characters of a header's value that are shown
app = cli.app(help=__doc__, no_args_is_help=True)


class Layout(StrEnum):
    """The layouts of LoRA files."""

    diffusers = "diffusers"
    kohya = "kohya"
    peft = "peft"


class Dtype(StrEnum):
    """The dtypes of weights in a file."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


FilePath = Annotated[Path, typer.Argument(help="A safetensors file, or the folder of an export or of peft.", show_default=False)]
Output = Annotated[Path, typer.Option(help="File to write; for peft a folder.", show_default=False)]
As = Annotated[Dtype | None, typer.Option(help="Dtype of the weights; default: the file's own.")]
To = Annotated[Layout | None, typer.Option(help="The layout; default: the file's own.")]


@app.command("inspect")
def inspect_file(file: FilePath) -> None:
    """Layout, ranks, alphas, layers and norms of the update by block, dtype, header."""
    found = _read(file)
    numbers = [layer for layers in found.parts.values() for layer in layers.values()]
    print(f"layout   {found.layout}")
    print(f"ranks    {_counted(layer.rank for layer in numbers)}")
    print(f"alphas   {_counted(f'{layer.alpha:g}' for layer in numbers)}")
    print(f"dtype    {_counted(str(tensor.dtype).removeprefix('torch.') for layer in numbers for tensor in layer[:2])}")
    table = Table("part", "block", "layers", "‖s·BA‖")
    for part, layers in found.parts.items():
        blocks: dict[str, list[float]] = defaultdict(list)
        for name, layer in layers.items():
            blocks[block_of(name)].append(squared_norm(layer))
        for block, squares in blocks.items():
            table.add_row(part, block, str(len(squares)), f"{sum(squares) ** 0.5:.4g}")
        table.add_row(part, "all", str(len(layers)), f"{sum(map(sum, blocks.values())) ** 0.5:.4g}", end_section=True)
    Console().print(table)
    for key, value in sorted(found.header.items()):
        print(f"{key}: {value if len(value) <= LONG else f'{value[:LONG]}… ({len(value):,} characters)'}")


@app.command()
def convert(
    file: FilePath, to: Annotated[Layout, typer.Option(help="The layout to write.")], output: Output, dtype: As = None
) -> None:
    """The same update in another layout."""
    found = _read(file)
    _write(to, output, found.parts, found, dtype)


@app.command()
def resize(
    file: FilePath,
    output: Output,
    rank: Annotated[int | None, typer.Option(min=1, help="Highest rank of a layer.")] = None,
    keep: Annotated[float | None, typer.Option(help="Instead: share of each layer's squared norm to keep, such as 0.95.")] = None,
    to: To = None,
    dtype: As = None,
) -> None:
    """The nearest update of lower rank, by the singular values of each layer's."""
    if (rank is None) == (keep is None):
        raise ConfigError("resize needs --rank R or --keep SHARE, and not both")
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(f"--keep is {keep:g}; it is a share of the squared norm, above 0 and at most 1")
    found = _read(file)
    _write(to, output, _cut(found.parts, rank, keep), found._replace(header=without_schedule(found.header)), dtype)


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="LoRAs of one base model.", show_default=False)],
    weights: Annotated[list[float], typer.Option(help="One for each file: --weights 0.5 0.5", show_default=False)],
    output: Output,
    rank: Annotated[int | None, typer.Option(min=1, help="Truncate the sum to this rank; default: exact.")] = None,
    to: To = None,
    dtype: As = None,
) -> None:
    """The weighted sum of several updates, exactly (ranks add up), or its nearest of a lower rank."""
    if len(files) != len(weights):
        raise ConfigError(f"--weights has {len(weights)} numbers for {len(files)} files; give one for each")
    found = [_read(file) for file in files]
    whole: Parts = merged([one.parts for one in found], weights)
    print(f"sum of {len(found)} updates, ranks {_counted(layer.rank for own in whole.values() for layer in own.values())}")
    values = {key: value for key, value in found[0].header.items() if all(one.header.get(key) == value for one in found)}
    _write(to, output, _cut(whole, rank, None) if rank else whole, found[0]._replace(header=without_schedule(values)), dtype)


@app.command()
def bake(
    file: FilePath,
    base: Annotated[str, typer.Option(help="The base model: a folder in diffusers' layout, or a hub id.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder to write the whole pipeline to.", show_default=False)],
    strength: Annotated[float, typer.Option(help="Strength of the update; 1 is the trained one.")] = 1.0,
    variant: Annotated[str | None, typer.Option(help="Variant of the base's files, such as fp16.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the pipeline's weights.")] = Dtype.float32,
) -> None:
    """The base model with the update added into its weights, text encoders included, as a pipeline that needs no LoRA."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {str(output)!r} exists and is not an empty folder; choose a new one")
    found = _read(file)
    pipeline = _pipeline(base, variant)
    _load(pipeline, found.parts, base)
    pipeline.fuse_lora(components=list(found.parts), lora_scale=strength)
    pipeline.unload_lora_weights()
    with atomic_folder(output.expanduser()) as made:
        pipeline.to(getattr(torch, dtype.value)).save_pretrained(made)
    print(f"{sum(map(len, found.parts.values()))} layers of {', '.join(found.parts)} at strength {strength:g}: {output}")


def _read(path: Path) -> File:
    found = read(path.expanduser())
    if found.assumed:
        print(f"note: {found.assumed} layers of {path} have no alpha; alpha = rank is assumed, a scale of 1", file=sys.stderr)
    return found


def _write(to: Any, output: Path, parts: Parts, found: File, dtype: Any) -> None:
    layout = to.value if to else "diffusers" if found.layout == "comfyui" else found.layout
    layouts.write(layout, output.expanduser(), parts, found.header, getattr(torch, dtype.value) if dtype else None)
    print(f"{sum(map(len, parts.values()))} layers, layout {layout}: {output}")


def _cut(parts: Parts, rank: int | None, keep: float | None) -> Parts:
    """Every layer at a lower rank; prints the error, and the error expected from the dropped singular values."""
    whole = far = bound = 0.0
    found: dict[str, dict[str, Any]] = {}
    for part, layers in parts.items():
        for name, layer in layers.items():
            less, expected = cut(layer, rank, keep)
            found.setdefault(part, {})[name] = less
            whole, far, bound = whole + squared_norm(layer), far + squared_distance(layer, less), bound + expected
    error, least = ((square / whole) ** 0.5 if whole else 0.0 for square in (far, bound))
    print(f"ranks    {_counted(layer.rank for own in found.values() for layer in own.values())}")
    print(f"error    {error:.6g} of ‖ΔW‖; minimum possible, from the dropped singular values: {least:.6g}")
    return found


def _counted(values: Any) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count}×)" for value, count in sorted(counts.items()))


def _pipeline(base: str, variant: str | None) -> Any:
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(base, variant=variant, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--base is {base!r}, which can't be loaded: {reason}; give a folder in diffusers' layout") from error
    if not hasattr(pipeline, "load_lora_weights"):
        raise ConfigError(
            f"--base is {base!r}, a {type(pipeline).__name__}, into which diffusers can't load a LoRA; use another base"
        )
    return pipeline


def _load(pipeline: Any, parts: Parts, base: str) -> None:
    """Load the update; diffusers only warns about layers that do not match."""
    if absent := [part for part in parts if getattr(pipeline, part, None) is None]:
        raise ConfigError(
            f"--base is {base!r}, which has no {absent[0]}, for which the LoRA has layers; use the LoRA's base model"
        )
    try:
        pipeline.load_lora_weights(layouts.diffusers_weights(parts))
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--base is {base!r}, into which the LoRA can't be loaded ({reason}); use the LoRA's base model"
        ) from error
    for part, layers in parts.items():
        placed = sum(hasattr(module, "lora_A") for module in getattr(pipeline, part).modules())
        if placed != len(layers):
            raise ConfigError(f"--base is {base!r}, which has {placed} of the {len(layers)} layers of the LoRA's {part}")


def _spread(words: list[str]) -> list[str]:
    """`--weights 0.5 0.5` as the option parser takes it: the option's name before each number."""
    spread, inside = list[str](), False
    for word in words:
        number = inside and word.lstrip("+-").replace(".", "", 1).isdigit()
        inside = number or word == "--weights"
        spread += ["--weights", word] if number else [] if inside else [word]
    return spread


def main(words: list[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: app(_spread(sys.argv[1:] if words is None else words)))


if __name__ == "__main__":
    main()
