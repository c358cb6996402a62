"""The work of `tools.caption`: text files beside photos, and a page to review them."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

import torch
from PIL import Image
from rich.progress import track

from .. import sheet
from ..config import ConfigError
from ..data.sources import base, decode
from ..data.sources.decode import UNREADABLE
from ..data.sources.folder import Folder
from ..models.caption import Captioner
from ..page import document, picture
from ..storage.durable import write_text

SHOWN = 256  # px: a photo's longest side on the page
STYLE = "td{border-top:1px solid #8885;padding:.5em;vertical-align:top}td:first-child{max-width:50vw}"

Writer = Callable[[Image.Image], str]


class Made:
    """The results by photo."""

    def __init__(self) -> None:
        self.captions: dict[str, str] = {}
        self.failed: dict[str, str] = {}  # photo → the reason why it has none
        self.fresh = 0


def network(model: str, question: str | None, max_tokens: int) -> Captioner:
    """The captioner on the machine's best device."""
    return Captioner(model, "--model", torch.device("cuda" if torch.cuda.is_available() else "cpu"), question, max_tokens)


def write(input_dir: Path, say: Writer, put_in: Callable[[str], str], force: bool) -> Made:
    """Captions of all photos that have none.

    Raises:
        ConfigError: there are no photos.
    """
    photos = Folder(str(input_dir))
    items = list(photos.items())
    if not items:
        raise ConfigError(f"--input_dir is {str(input_dir)!r}, which contains no photos; give a folder of photos")
    made, taken = Made(), dict[str, str]()
    for item in track(items, "writing captions"):
        path = input_dir / f"{base.stem(item.name)}.txt"
        first = taken.setdefault(str(path), item.name)
        if item.problem or first != item.name:
            made.failed[item.name] = item.problem or f"{first} has the same name up to its extension, and the same text file"
        elif path.exists() and not force:
            _keep(item.name, path, made)
        else:
            _make(photos, item.name, path, say, put_in, made)
    return made


def _keep(name: str, path: Path, made: Made) -> None:
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if text:
        made.captions[name] = text
    else:
        made.failed[name] = f"{path.name} exists but is empty; write it, or use --force"


def _make(photos: Folder, name: str, path: Path, say: Writer, put_in: Callable[[str], str], made: Made) -> None:
    try:
        photo = Image.fromarray(decode.decode(photos.read(name)).permute(1, 2, 0).numpy())
    except UNREADABLE as error:
        made.failed[name] = f"can't be decoded: {error}"
        return
    caption = say(photo)
    if not caption:
        made.failed[name] = "the model returned nothing; try another --model or --question, or write it by hand"
        return
    made.captions[name], made.fresh = put_in(caption), made.fresh + 1
    write_text(path, made.captions[name] + "\n")


def save_page(input_dir: Path, made: Made, path: Path) -> None:
    """One self-contained HTML file of all photos with their captions."""
    rows = "".join(_row(input_dir, name, made) for name in sorted({*made.captions, *made.failed}))
    text = document("Captions", f"<table>{rows}</table>", STYLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _row(input_dir: Path, name: str, made: Made) -> str:
    if name in made.captions:
        prefix = "<br>".join(escape(line) for line in made.captions[name].splitlines())
    else:
        prefix = f"<span class=bad>no caption: {escape(made.failed[name])}</span>"
    return f"<tr><td>{_image(input_dir / name)}</td><td>{prefix}<br><small>{escape(name)}</small></td></tr>"


def _image(path: Path) -> str:
    try:
        return picture(sheet.small(Image.fromarray(decode.decode(path.read_bytes()).permute(1, 2, 0).numpy()), SHOWN), "")
    except UNREADABLE:
        return ""
