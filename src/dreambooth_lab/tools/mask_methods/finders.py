"""The methods of `tools.masks` for finding the subject in photos."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import numpy as np
from PIL import Image

from ...config import ConfigError
from ...data.sources import decode
from .grabcut import Found, Rect, grabcut

Finder = Callable[[bytes, Image.Image], Found]  # a photo's file and the photo, upright → confidence


class Method(StrEnum):
    grabcut = "grabcut"
    text = "text"
    rembg = "rembg"
    alpha = "alpha"


class NoMask(Exception):
    """A photo gets no mask; the message says why."""


def finder(method: Method, text: str | None, model: str | None, rect: str | None) -> Finder:
    """The function that finds the subject in a photo.

    Raises:
        ConfigError: the method lacks an option, or does not use a given one.
    """
    if rect is not None and method is not Method.grabcut:
        raise ConfigError(f"--rect is {rect!r}, which --method={method} does not use; remove it, or use --method=grabcut")
    if model is not None and method not in (Method.text, Method.rembg):
        raise ConfigError(f"--model is {model!r}, which --method={method} does not use; add --text_input and --method=text")
    if method is Method.text:
        return _by_text(text, model)
    if method is Method.rembg:
        return _rembg(model)
    if text is not None:
        print(f"--text_input={text!r} is not used by {method}; to search by text, add --model=CIDAS/clipseg-rd64-refined")
    if method is Method.alpha:
        return _alpha
    shares = _shares(rect) if rect is not None else None
    return lambda _, photo: grabcut(np.asarray(photo), _rect(shares, photo.size) if shares else None)


def _by_text(text: str | None, model: str | None) -> Finder:
    if not text or not model:
        raise ConfigError(f"--method is text, but --text_input is {text!r} and --model {model!r}; give both")
    import torch

    from ...models.segment import load

    network = load(model, "--model", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return lambda _, photo: network.find(photo, text).numpy()


def _rembg(model: str | None) -> Finder:
    """A U²-Net-like network, run by rembg, which reads it from a local file in its home folder."""
    path = Path(model).expanduser().resolve() if model else None
    if path is None or path.suffix != ".onnx" or not path.is_file():
        raise ConfigError(f"--method is rembg, but --model is {model!r}; give an .onnx file, such as rembg's u2net.onnx")
    os.environ["U2NET_HOME"] = str(path.parent)
    try:
        from rembg import new_session, remove
    except ImportError as error:
        raise ConfigError(f"--method is rembg, but {error.name} is not installed; pip install 'dreambooth-lab[rembg]'") from error
    session = new_session("u2net_custom", model_path=str(path))
    return lambda _, photo: np.asarray(remove(photo, session=session, only_mask=True), dtype=np.float32) / np.float32(255)


def _alpha(data: bytes, photo: Image.Image) -> Found:
    if not decode.head(data).alpha:
        raise NoMask("has no transparency; add an alpha channel, or use another --method")
    found: Found = decode.decode_mask(data, alpha=True)[0].numpy().astype(np.float32) / np.float32(255)
    return found


def _shares(text: str) -> list[float]:
    try:
        left, top, width, height = values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or min(left, top) < 0 or min(width, height) <= 0 or max(left + width, top + height) > 1 or width * height == 1:
        asked = "LEFT,TOP,WIDTH,HEIGHT as shares of the sides, with some background outside, such as 0.1,0.2,0.8,0.7"
        raise ConfigError(f"--rect is {text!r}; give {asked}")
    return values


def _rect(shares: list[float], size: tuple[int, int]) -> Rect:
    left, top, width, height = (round(share * side) for share, side in zip(shares, size * 2, strict=True))
    return left, top, max(width, 1), max(height, 1)
