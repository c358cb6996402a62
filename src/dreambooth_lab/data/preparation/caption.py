"""The captions of an image; each sample draws one."""

from __future__ import annotations

from ...config import enums
from ..sources.base import Picture, stem
from ..spec import Captions


class NoCaption(Exception):
    """An image has no caption; the message says where it was expected, and a fix."""


def captions(picture: Picture, rule: Captions) -> tuple[str, ...]:
    """All captions of an image, in order.

    Raises:
        NoCaption: there is none.
    """
    if rule.only_prompt or rule.kind is enums.CaptionKind.instanceprompt:
        return rule.prompts
    own = _own(picture, rule)
    return tuple(f"{prompt} {text}" for prompt in rule.prompts for text in own) if rule.prepend else own


def _own(picture: Picture, rule: Captions) -> tuple[str, ...]:
    if rule.kind is enums.CaptionKind.filename:
        return (picture.stem.rpartition("/")[2].replace("_", " ").strip(),)
    if rule.kind is enums.CaptionKind.textfile:
        return _of_text_file(picture, rule)
    if not picture.captions:
        raise NoCaption("its caption column is empty; fill it, or choose another column or caption strategy")
    return picture.captions


def _of_text_file(picture: Picture, rule: Captions) -> tuple[str, ...]:
    beside = f"{stem(picture.name)}.txt"
    try:
        text = picture.source.text(picture.name)
    except UnicodeDecodeError as error:
        raise NoCaption(f"{beside} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise NoCaption(f"{beside} can't be read: {error.strerror}") from error
    if text is None:
        raise NoCaption(f"{beside} is missing; write it, or choose another caption strategy")
    lines = [text] if rule.whole_file else text.splitlines()
    caption_lines = tuple(" ".join(line.split()) for line in lines if line.strip())
    if not caption_lines:
        raise NoCaption(f"{beside} is empty; write a caption in it")
    return caption_lines
