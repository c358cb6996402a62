"""Generate images from a run or an exported file, with diffusers' own pipeline:

    python -m dreambooth_lab.tools.generate run=runs/RUN 'prompt=a photo of sks dog in the snow' seeds=[0,1,2,3]
    python -m dreambooth_lab.tools.generate file=lora.safetensors 'prompt=["a photo of sks dog", "a dog"]' strengths=[0,0.5,1]
    python -m dreambooth_lab.tools.generate file=lora.safetensors model=owner/sdxl 'prompt=a dog'      # any other LoRA

Writes each image, with its settings in the PNG metadata, and grid.png: a row for each prompt and strength, a column for each
seed. A file of this project names its base model in the header, unless that was a local folder. In this case, and for any other
LoRA that diffusers reads, set model=.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open

from ..config import LOCAL, ConfigError, class_prompt_of, saved
from ..config.monitoring_rules import steering_problems
from ..config.reader import Reader
from ..config.saved import literal
from ..lab import compose, load
from .common import cli

if TYPE_CHECKING:
    from ..trained import TrainedPipeline

WORDS = ("prompt", "negative")  # taken as typed, including colons; a list in brackets is a list
PLACES = ("run", "file", "model", "image", "out")  # taken as typed


@dataclass
class GenerateArgs:
    """The arguments."""

    run: str | None = None  # a run's folder, or
    file: str | None = None  # an exported safetensors file, or the folder of one
    model: str | None = None  # the base model of a file that doesn't name it, or names a local folder: a folder or hub id
    prompt: Any = None  # one, or a list
    negative: str = ""  # empty: the unconditional input of the family, as in training
    seeds: Any = 4  # a list, or how many from 0 on
    strengths: Any = 1.0  # of the trained update; one, or a list: 0 is the base model
    steps: int | None = None  # null: the run's validation.num_inference_steps
    guidance: float | None = None  # null: the run's validation.guidance_scale
    resolution: int | None = None  # px; null: the run's validation.resolution
    superclass: str | None = None  # none, switch or mix; null: the run's validation.superclass
    superclass_share: float | None = None  # null: the run's validation.superclass_share
    personal_guidance: float | None = None  # null: the run's validation.personal_guidance
    image: str | None = None  # the input of image-to-image models: SDXL's refiner, DeepFloyd's stage II
    ema: bool = False  # the averaged weights
    out: str = "generated"  # a folder; if it exists, the next free number is appended


def _known() -> list[str]:
    return [field.name for field in fields(GenerateArgs)]


class Picture(NamedTuple):
    """One image to generate."""

    prompt: str
    strength: float
    seed: int


def read(words: list[str]) -> GenerateArgs:
    """The command line, typed.

    Raises:
        ConfigError: an unknown argument, an invalid value, or neither a run nor a file.
    """
    lines = [(key, value) for key, _, value in (word.partition("=") for word in words)]
    raw = {key: literal(value) for key, value in lines if key in PLACES or (key in WORDS and value[:1] != "[")}
    try:
        typed = OmegaConf.from_cli([word for word in words if word.partition("=")[0] not in raw])
        args: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(GenerateArgs), typed, raw))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}; known: {', '.join(_known())}") from error
    if (args.run is None) == (args.file is None):
        raise ConfigError("set either run=FOLDER or file=EXPORT")
    if args.run is not None and args.model is not None:
        raise ConfigError(f"model is {args.model!r}, but a run's base model is known; remove it")
    args.prompt = _listed("prompt", args.prompt, str)
    args.seeds = _listed("seeds", list(range(args.seeds)) if type(args.seeds) is int else args.seeds, int)
    args.strengths = [float(strength) for strength in _listed("strengths", args.strengths, int | float)]
    for key, least in (("steps", 1), ("guidance", 0), ("resolution", 16)):
        if getattr(args, key) is not None and getattr(args, key) < least:
            raise ConfigError(f"{key} is {getattr(args, key)}; it must be at least {least}")
    return args


def _listed(key: str, value: Any, kind: Any) -> list[Any]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not values or not all(isinstance(each, kind) and not isinstance(each, bool) for each in values):
        raise ConfigError(f"{key} is {value!r}; give one, or a list: {key}=[…]")
    return values


def config_from_header(path: Path, model: str | None) -> DictConfig:
    """The configuration in an export's header, or one for another LoRA on a base model."""
    if not path.exists():
        raise ConfigError(f"file is {str(path)!r}, which does not exist; give a safetensors file, or a folder with one")
    for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                config_text = (opened.metadata() or {}).get("config")
        except SafetensorError as error:
            raise ConfigError(f"file is {str(path)!r}, where {file.name} is not a safetensors file ({error})") from error
        if config_text and "${" in config_text:  # ours are resolved; others could read environment variables
            raise ConfigError(f"file is {str(path)!r}, whose configuration has interpolations and is not read; set model=BASE")
        if config_text:
            return _with_local_paths(saved.load(config_text, f"the header of {str(file)!r}"), path, model)
    if model is None:
        raise ConfigError(f"file is {str(path)!r}, which has no configuration in its header; set model=BASE, or run=FOLDER")
    return compose("model=diffusers", f"model.pretrained={model}", "dataset.path=.")


def _with_local_paths(cfg: DictConfig, path: Path, model: str | None) -> DictConfig:
    """A header's configuration with its local paths replaced: the base by `model`, a LyCORIS file by the one beside the export.

    Raises:
        ConfigError: the base was a local folder, and `model` is not set.
    """
    if model is not None:
        cfg.model.pretrained = model
    base = cfg.model.pretrained
    if base.startswith(LOCAL):
        prefix = f"file is {str(path)!r}, which was trained on {base.removeprefix(LOCAL)!r}, a local folder or file of its author"
        raise ConfigError(f"{prefix}; set model=BASE, its folder on this machine or its hub id")
    for key in ("config", "tae"):
        cfg.model[key] = None if str(cfg.model[key]).startswith(LOCAL) else cfg.model[key]
    if str(cfg.adapter.preset).startswith(LOCAL):
        cfg.adapter.preset = str((path if path.is_dir() else path.parent) / "lycoris_config.json")
    return cfg


def generate(args: GenerateArgs) -> Path:
    """Generate all images; returns the grid's path."""
    from ..models.steering import Steering
    from ..trained import TrainedPipeline

    export = load(args.run).export(args.ema) if args.run else Path(str(args.file)).expanduser()
    export = export / "ema" if args.ema and not args.run else export
    cfg = load(args.run).config if args.run else config_from_header(export, args.model)
    steer(cfg, args)
    trained = TrainedPipeline(cfg, export)
    edge = args.resolution or cfg.validation.resolution
    image = begin(trained, args.image, edge)
    asked = [Picture(p, strength, seed) for p in args.prompt for strength in args.strengths for seed in args.seeds]
    made = []
    for picture in track(asked, "drawing", console=Console(stderr=True)):
        trained.set_scale(picture.strength)
        made += trained.draw(
            picture.prompt, args.negative, edge, args.steps or cfg.validation.num_inference_steps,
            cfg.validation.guidance_scale if args.guidance is None else args.guidance, picture.seed, image,
            Steering.of(cfg.validation),
            class_prompt_of(picture.prompt, cfg.dataset.instance_prompt, cfg.dataset.class_prompt, cfg.adapter.token),
        )  # fmt: skip
    return _save(_free(Path(args.out).expanduser()), args, asked, made)


def steer(cfg: DictConfig, args: GenerateArgs) -> None:
    """Put the steering that is asked for into a run's configuration.

    Raises:
        ConfigError: it can't be.
    """
    node = cfg.validation
    for key in ("superclass", "superclass_share", "personal_guidance"):
        if (value := getattr(args, key)) is not None:
            try:
                node[key] = value
            except OmegaConfBaseException as error:
                raise ConfigError(f"{key} is {value!r}; it must be none, switch or mix") from error
    if args.guidance is not None:
        node.guidance_scale = args.guidance
    if wrong := [problem for problem in steering_problems(Reader(cfg, set())) if problem]:
        raise ConfigError("; ".join(wrong))


def begin(trained: TrainedPipeline, place: str | None, edge: int) -> Image.Image | None:
    """The square input image of an image-to-image model."""
    changes = bool(trained.family.image_arguments(None))
    if changes != (place is not None):
        way_out = "set image=FILE, the input image" if changes else "remove it: this model generates from prompts only"
        raise ConfigError(f"image is {place!r}; {way_out}")
    if place is None:
        return None
    from ..data.sources import colour

    try:
        return ImageOps.fit(colour.to_srgb(Image.open(Path(place).expanduser())).convert("RGB"), (edge, edge))
    except OSError as error:
        raise ConfigError(f"image is {place!r}, which is not an image ({error})") from error


def _free(folder: Path) -> Path:
    """A folder that does not exist yet."""
    taken: Iterator[Path] = (folder.with_name(f"{folder.name}_{i}") for i in range(2, 10_000))
    return folder if not folder.exists() else next(path for path in taken if not path.exists())


def _save(folder: Path, args: GenerateArgs, asked: list[Picture], made: list[Image.Image]) -> Path:
    folder.mkdir(parents=True)
    columns = len(args.seeds)
    for i, (picture, image) in enumerate(zip(asked, made, strict=True)):
        png_info = PngInfo()
        png_info.add_text("dreambooth_lab", json.dumps(asdict(args) | picture._asdict()))
        image.save(folder / f"{i // columns:02d}_{i % columns:02d}.png", pnginfo=png_info)
    grid(asked, made, columns).save(folder / "grid.png")
    return folder / "grid.png"


def grid(asked: list[Picture], made: list[Image.Image], columns: int) -> Image.Image:
    """A grid of images, each row below its prompt and strength, each column below its seed."""
    width, height = made[0].size
    font = ImageFont.load_default(size=max(12, width // 24))
    line = 2 * font.getbbox("Ag")[3]
    rows = len(made) // columns
    sheet = Image.new("RGB", (width * columns, int(line) + rows * (height + int(line))), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, image) in enumerate(zip(asked, made, strict=True)):
        x, y = i % columns * width, int(line) + i // columns * (height + int(line))
        if i < columns:
            draw.text((x + 4, line // 4), f"seed {picture.seed}", "black", font)
        if i % columns == 0:
            draw.text((4, y + line // 4), f"strength {picture.strength:g}: {picture.prompt}", "black", font)
        sheet.paste(image, (x, y + int(line)))
    return sheet


application = cli.app()


@application.command(help=cli.text(__doc__))
def _command(
    words: Annotated[list[str] | None, typer.Argument(help=f"known: {', '.join(_known())}", metavar="KEY=VALUE …")] = None,
) -> None:
    print(generate(read(words or [])))


def main(words: list[str] | None = None) -> None:
    """The command line."""
    cli.run(lambda: application(words))


if __name__ == "__main__":
    main()
