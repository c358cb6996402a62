"""Pictures from a run or an exported file, with diffusers' own pipeline:

    python -m dreambooth_lab.tools.generate run=runs/RUN 'prompt=a photo of sks dog in the snow' seeds=[0,1,2,3]
    python -m dreambooth_lab.tools.generate file=lora.safetensors 'prompt=["a photo of sks dog", "a dog"]' strengths=[0,0.5,1]
    python -m dreambooth_lab.tools.generate file=lora.safetensors model=owner/sdxl 'prompt=a dog'      # a LoRA made elsewhere

Writes each picture, which says how it was made, and grid.png: a row for each prompt and strength, a column for each seed.
A file made here says in its header what it was trained on; any other LoRA that diffusers reads needs model=.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open

from ..config import Config, ConfigError
from ..lab import compose, load
from ..run import Trained

WORDS = ("prompt", "negative")  # taken as they are typed, colons and all


@dataclass
class Ask:
    """What may be said."""

    run: str | None = None  # a run's folder, or
    file: str | None = None  # an exported safetensors file, or the folder of one
    model: str | None = None  # the base of a file that doesn't say it: a folder or hub id
    prompt: Any = None  # one, or a list
    negative: str = ""  # empty: the unconditional input of the family, as in training
    seeds: Any = 4  # a list, or how many from 0 on
    strengths: Any = 1.0  # of what was trained; one, or a list: 0 is the base model
    steps: int | None = None  # null: the run's validation.num_inference_steps
    guidance: float | None = None  # null: the run's validation.guidance_scale
    resolution: int | None = None  # px; null: the run's validation.resolution
    image: str | None = None  # to begin from, for models that change a given one: SDXL's refiner, DeepFloyd's stage II
    ema: bool = False  # the averaged weights
    out: str = "generated"  # a folder; if it is there, the next free number is put behind


class Picture(NamedTuple):
    """One picture to draw."""

    prompt: str
    strength: float
    seed: int


def read(words: list[str]) -> Ask:
    """The command line, typed.

    Raises:
        ConfigError: a word that is not known, a value that can't be, or neither a run nor a file.
    """
    raw = {key: value for key, _, value in (word.partition("=") for word in words) if key in WORDS and value[:1] != "["}
    try:
        typed = OmegaConf.from_cli([word for word in words if word.partition("=")[0] not in raw])
        ask: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Ask), typed, raw))
    except OmegaConfBaseException as error:
        known = ", ".join(field.name for field in fields(Ask))
        raise ConfigError(f"{str(error).splitlines()[0]}; known: {known}") from error
    if (ask.run is None) == (ask.file is None):
        raise ConfigError("say run=FOLDER or file=EXPORT, one of them")
    if ask.run is not None and ask.model is not None:
        raise ConfigError(f"model is {ask.model!r}, but a run says itself what it was trained on; leave it out")
    ask.prompt = _listed("prompt", ask.prompt, str)
    ask.seeds = _listed("seeds", list(range(ask.seeds)) if type(ask.seeds) is int else ask.seeds, int)
    ask.strengths = [float(strength) for strength in _listed("strengths", ask.strengths, int | float)]
    for key, least in (("steps", 1), ("guidance", 0), ("resolution", 16)):
        if getattr(ask, key) is not None and getattr(ask, key) < least:
            raise ConfigError(f"{key} is {getattr(ask, key)}; it must be at least {least}")
    return ask


def _listed(key: str, value: Any, kind: Any) -> list[Any]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not values or not all(isinstance(each, kind) and not isinstance(each, bool) for each in values):
        raise ConfigError(f"{key} is {value!r}; give one, or a list: {key}=[…]")
    return values


def trained_with(path: Path, model: str | None) -> DictConfig:
    """The configuration in an export's header, or one for a LoRA made elsewhere on a base model."""
    if not path.exists():
        raise ConfigError(f"file is {str(path)!r}, which does not exist; give a safetensors file, or a folder with one")
    for file in [path] if path.is_file() else sorted(path.rglob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                said = (opened.metadata() or {}).get("config")
        except SafetensorError as error:
            raise ConfigError(f"file is {str(path)!r}, where {file.name} is no safetensors file ({error})") from error
        if said and "${" in said:  # ours are resolved; another's could read this machine's environment
            raise ConfigError(f"file is {str(path)!r}, whose configuration interpolates; it is not read: give model=BASE")
        if said:
            merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(said))
            assert isinstance(merged, DictConfig)
            return merged
    if model is None:
        raise ConfigError(f"file is {str(path)!r}, which does not say how it was made; give model=BASE, or run=FOLDER")
    return compose("model=diffusers", f"model.pretrained={model}", "dataset.path=.")


def paint(ask: Ask) -> Path:
    """Draw everything that was asked for; returns the grid's path."""
    export = load(ask.run).export(ask.ema) if ask.run else Path(str(ask.file)).expanduser()
    export = export / "ema" if ask.ema and not ask.run else export
    cfg = load(ask.run).config if ask.run else trained_with(export, ask.model)
    trained = Trained(cfg, export)
    edge = ask.resolution or cfg.validation.resolution
    image = begin(trained, ask.image, edge)
    asked = [Picture(p, strength, seed) for p in ask.prompt for strength in ask.strengths for seed in ask.seeds]
    made = []
    for picture in asked:
        trained.strengthen(picture.strength)
        made += trained.draw(
            picture.prompt, ask.negative, edge, ask.steps or cfg.validation.num_inference_steps,
            cfg.validation.guidance_scale if ask.guidance is None else ask.guidance, picture.seed, image,
        )  # fmt: skip
    return _save(_free(Path(ask.out).expanduser()), ask, asked, made)


def begin(trained: Trained, place: str | None, edge: int) -> Image.Image | None:
    """The square picture that pictures are made from, if the model changes given ones."""
    changes = bool(trained.family.begin(None))
    if changes != (place is not None):
        way_out = "give image=FILE, which it changes" if changes else "leave it out: this model draws from prompts alone"
        raise ConfigError(f"image is {place!r}; {way_out}")
    if place is None:
        return None
    try:
        return ImageOps.fit(Image.open(Path(place).expanduser()).convert("RGB"), (edge, edge))
    except OSError as error:
        raise ConfigError(f"image is {place!r}, which is no picture ({error})") from error


def _free(folder: Path) -> Path:
    """A folder that is not there yet."""
    taken: Iterator[Path] = (folder.with_name(f"{folder.name}_{i}") for i in range(2, 10_000))
    return folder if not folder.exists() else next(path for path in taken if not path.exists())


def _save(folder: Path, ask: Ask, asked: list[Picture], made: list[Image.Image]) -> Path:
    folder.mkdir(parents=True)
    columns = len(ask.seeds)
    for i, (picture, image) in enumerate(zip(asked, made, strict=True)):
        said = PngInfo()
        said.add_text("dreambooth_lab", json.dumps(asdict(ask) | picture._asdict()))
        image.save(folder / f"{i // columns:02d}_{i % columns:02d}.png", pnginfo=said)
    grid(asked, made, columns).save(folder / "grid.png")
    return folder / "grid.png"


def grid(asked: list[Picture], made: list[Image.Image], columns: int) -> Image.Image:
    """Pictures in rows, each row below its prompt and strength, each column below its seed."""
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


def main() -> None:
    try:
        print(paint(read(sys.argv[1:])))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
