"""Pictures with the statistics of natural ones, so that the VAE also carries photographs: 1/f fields and polygons."""

import numpy as np
from PIL import Image, ImageDraw

from dreambooth_lab.toybox.world import Size


def noise_field(rng: np.random.Generator, size: Size, power: float) -> np.ndarray:
    """Three correlated fields of spectrum 1/f^power, uint8 [h w 3]."""
    h, w = size
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    f[0, 0] = 1 / max(h, w)
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, h, w))) / f**power, s=size)
    field = (field - field.mean((1, 2), keepdims=True)) / (field.std((1, 2), keepdims=True) + 1e-6)
    mix = np.ones((3, 3)) + rng.uniform(0, 1.2) * rng.standard_normal((3, 3))
    field = np.einsum("ij,jhw->hwi", mix / 1.7, field)
    return np.clip(rng.uniform(50, 205, 3) + rng.uniform(15, 55) * field, 0, 255).astype(np.uint8)


def polygons(rng: np.random.Generator, image: Image.Image, n: int) -> Image.Image:
    """Occluding shapes, flat or filled with another field: the edges that photographs have."""
    w, h = image.size
    draw = ImageDraw.Draw(image)
    for _ in range(n):
        centre, r = rng.uniform(0, 1, 2) * (w, h), rng.uniform(0.06, 0.4) * min(w, h)
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        points = [tuple(centre + r * rng.uniform(0.6, 1) * np.array([np.cos(a), np.sin(a)])) for a in angles]
        if rng.random() < 0.3:
            cut = Image.new("L", (w, h))
            ImageDraw.Draw(cut).polygon(points, fill=255)
            image.paste(Image.fromarray(noise_field(rng, (h, w), rng.uniform(0.8, 1.8))), (0, 0), cut)
        else:
            draw.polygon(points, fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return image


def texture(seed: int, size: Size) -> np.ndarray:
    """uint8 [h w 3], a pure function of the seed."""
    rng = np.random.default_rng([seed, 0x74])
    image = Image.fromarray(noise_field(rng, size, rng.uniform(0.9, 2.0)))
    return np.asarray(polygons(rng, image, int(rng.integers(0, 9))))
