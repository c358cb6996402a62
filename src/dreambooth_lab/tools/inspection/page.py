"""The page of `tools.look`: one self-contained HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from ... import sheet
from ...data.preparation import notices
from ...page import document, picture
from .photos import ANALYSIS_SIZE, BLURRED, Crop, InspectedPhoto

if TYPE_CHECKING:
    from ..look import DatasetInspection, Inspection

Tokens = dict[str, dict[str, int]]  # caption → text encoder → number of tokens
SHOWN = 320  # px: a picture's longest side on the page
STYLE = """article{border-top:1px solid #8885;padding:1em 0}
figure{display:inline-block;margin:0 1em .5em 0;vertical-align:top;max-width:100%}"""


def page(inspected: Inspection, overrides: list[str]) -> str:
    """The whole page."""
    command = shlex.join(["python", "-m", "dreambooth_lab", *overrides])
    body = [f"<p><code>{escape(command)}</code></p>"]
    body += [_list(inspected.problems, "bad"), _list(inspected.notices, "odd")]
    body += [_dataset(one, inspected.tokens) for one in inspected.datasets]
    body.append(
        f"<p><small>Blurred: the variance of the Laplacian of the brightness, at a longest side of {ANALYSIS_SIZE} px, is "
        f"under {BLURRED:g}. In masked images, tinted areas have less weight; a square is a cell of the latent grid.</small></p>"
    )
    return document("Training data", "".join(body), STYLE)


def _list(lines: Iterable[str], kind: str) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul class={kind}>{items}</ul>" if items else ""


def _dataset(one: DatasetInspection, tokens: Tokens) -> str:
    title = f"<h2>{escape(one.id)}</h2><p>{len(one.seen)} photos of <code>{escape(one.place)}</code></p>"
    left_out = _list((f"{name} is not trained on: {why}" for name, why in one.left_out.items()), "bad")
    return title + _list(one.remarks, "odd") + left_out + "".join(_photo(seen, tokens) for seen in one.seen)


def _photo(seen: InspectedPhoto, tokens: Tokens) -> str:
    height, width = seen.picture.size
    facts = f"<h3>{escape(seen.picture.name)}</h3>{_list(seen.problems, 'bad')}{_list(seen.remarks, 'odd')}"
    prefix = "".join(f"<br>“{escape(caption)}” <small>{_counts(tokens[caption])}</small>" for caption in seen.captions)
    whole = _figure(seen.image, f"{width}×{height} px, sharpness {seen.sharpness:.0f}")
    return f"<article>{facts}<p>captions:{prefix}</p>{whole}{''.join(_crop(crop) for crop in seen.crops)}</article>"


def _counts(counts: dict[str, int]) -> str:
    parts = (f"{number} for {part}" for part, number in counts.items())
    return f"tokens: {', '.join(parts)}"


def _crop(crop: Crop) -> str:
    text = f"{crop.entry.spec.id}: {crop.image.width}×{crop.image.height}, {notices.cropped_share(crop.entry):.0%} cropped away"
    text += ", mirrored" if crop.mirrored else ""
    if crop.mask is None:
        return _figure(crop.image, text)
    return _figure(crop.image, text) + _figure(sheet.overlay(crop.image, crop.mask), f"{text}, with its mask")


def _figure(image: Image.Image, text: str) -> str:
    return f"<figure>{picture(sheet.small(image, SHOWN), text)}<figcaption>{escape(text)}</figcaption></figure>"
