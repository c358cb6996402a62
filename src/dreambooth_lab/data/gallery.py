"""The gallery's look-alikes: images of individuals that are not the subject, which a judge has to tell from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from PIL import Image

from ..config import ConfigError
from .preparation.entry import Entry
from .sources import decode
from .sources.folder import Folder

KEY = "eval.gallery"


class Gallery(NamedTuple):
    """A folder of look-alikes, one or more images each, in subfolders or not; all have been read once."""

    folder: Folder
    names: tuple[str, ...]

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """The images, upright, a few at a time."""
        for first in range(0, len(self.names), size):
            yield [_image(self.folder, name) for name in self.names[first : first + size]]


def read(path: str, entries: Iterable[Entry]) -> Gallery:
    """The gallery of a folder.

    Args:
        entries: the run's; those of the subject must not be in the gallery.

    Raises:
        ConfigError: it has no image, an unreadable one, or a photo of the subject.
    """
    folder = Folder(path)
    own = {entry.picture.digest: entry.picture.name for entry in entries if not entry.spec.is_class}
    names, problems = [], []
    for item in folder.items():
        problem = item.problem or _problem(folder, item.name, own)
        problems += [f"{item.name} {problem}"] if problem else []
        names.append(item.name)
    if not names:
        problems.append("it has no image; give a folder of other individuals of the subject's class")
    if problems:
        raise ConfigError(f"{KEY} is {path!r}: {'; '.join(problems)}")
    return Gallery(folder, tuple(names))


def _problem(folder: Folder, name: str, own: dict[str, str]) -> str:
    try:
        data = folder.read(name)
        if photo := own.get(decode.digest(data)):
            return f"is the subject's own photo {photo}; remove it from the gallery"
        decode.decode(data)
    except decode.UNREADABLE as error:
        return f"can't be read ({type(error).__name__}); remove it from the gallery"
    return ""


def _image(folder: Folder, name: str) -> Image.Image:
    return Image.fromarray(decode.decode(folder.read(name)).permute(1, 2, 0).numpy())
