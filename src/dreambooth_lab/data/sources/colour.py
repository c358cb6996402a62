"""Colours as sRGB: images with an ICC profile of another space (Display-P3, Adobe RGB, CMYK) are converted by LittleCMS."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

SRGB = ImageCms.createProfile("sRGB")
SAME = 2  # levels of 255: a profile that changes no colour by more is treated as sRGB
CONVERTED, DAMAGED = "converted", "damaged: "  # results of `profile_status`
SPACES = {"RGB ": "RGB", "CMYK": "CMYK", "GRAY": "L"}  # a profile's colour space → Pillow's mode
INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION


def profile_status(image: Image.Image) -> str:
    """The status of an image's colours: "" if they are sRGB or have no profile, `CONVERTED`, or `DAMAGED` and the reason."""
    profile = image.info.get("icc_profile")
    return _profile_status(profile, image.mode) if profile and image.mode[0] not in "IF1" else ""


@lru_cache(maxsize=64)
def _profile_status(profile: bytes, mode: str) -> str:
    try:
        conversion, base = _conversion(profile)
        if base != "RGB" and mode.rstrip("Aa") != base:
            return f"{DAMAGED}it is for {base} images, but this image is {mode}"
        grid = _grid(base)
        moved = np.abs(_pixels(_applied(grid, conversion)) - _pixels(grid.convert("RGB"))).max()
        return CONVERTED if base == "CMYK" or moved > SAME else ""
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError) as error:
        return f"{DAMAGED}{str(error).splitlines()[0] if str(error) else type(error).__name__}"


@lru_cache(maxsize=64)
def _conversion(profile: bytes) -> tuple[ImageCms.ImageCmsTransform, str]:
    """LittleCMS' transform to sRGB, and the mode of its input."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    base = SPACES[opened.profile.xcolor_space]
    return ImageCms.buildTransform(opened, SRGB, base, "RGB", INTENT, FLAGS), base


def _applied(image: Image.Image, conversion: ImageCms.ImageCmsTransform) -> Image.Image:
    made = ImageCms.applyTransform(image, conversion)
    assert made is not None  # None only for in-place conversion
    return made


def _grid(mode: str) -> Image.Image:
    """Colours that cover a mode's colour space."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    axes = np.meshgrid(*[np.linspace(0, 255, 9)] * channels, indexing="ij")
    flat = np.stack([axis.ravel() for axis in axes], -1).round().astype(np.uint8)
    return Image.fromarray(flat[None] if channels > 1 else flat[None, :, 0], mode)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def to_srgb(image: Image.Image) -> Image.Image:
    """The image in sRGB with its transparency; unchanged if `profile_status` requires no conversion."""
    if profile_status(image) != CONVERTED:
        return image
    conversion, base = _conversion(image.info["icc_profile"])
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image if image.mode == base else image.convert("RGBA").convert("RGB") if alpha else image.convert(base)
    made = _applied(colours.convert(base), conversion)
    if alpha:
        made.putalpha(alpha)
    return made
