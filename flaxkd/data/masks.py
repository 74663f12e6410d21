"""Masks to learn inpainting from: rectangles, strokes, or the whole picture, a few for every picture.

An inpainting UNet sees, beside the noisy latents, a mask and the latents of the picture without what is masked. Those
come from pixels, so the masks are drawn and encoded once, with the picture, and a train step takes one of them at
random. A step that drew them itself would run the encoder each time, at 512 pixels 1.4 times the compute of the
teacher's forward pass, and read pictures in place of latents. This way a record is 3.25 times as large.

A mask follows from the picture's bytes alone: it depends neither on the order of the source, nor on who encodes it, nor
on a kill. A mirrored picture has masks of its own.
"""

import zlib

import numpy as np
from PIL import Image, ImageDraw

MASKS = 4  # of a picture
WHOLE = 0.25  # share of masks over the whole picture: that of Stable Diffusion Inpainting's model card
MOST = 3  # shapes in a mask

# Of a record: {name: (dtype, shape)}. The latents are the mean of their posterior, unscaled, like the moments.
FIELDS = {
    "masks": ("uint8", (MASKS, None, None, 1)),
    "masked_latents": ("float16", (MASKS, None, None, None)),
}


def of_picture(image: np.ndarray) -> np.ndarray:
    """bool[MASKS, H, W] for a picture uint8[H, W, 3]; True is to be drawn."""
    rng = np.random.default_rng(zlib.crc32(image.tobytes()))
    return np.stack([sample(rng, *image.shape[:2]) for _ in range(MASKS)])


def sample(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """bool[height, width], True somewhere."""
    if rng.random() < WHOLE:
        return np.ones((height, width), bool)
    mask = Image.new("1", (width, height))
    shape = (_rectangle, _stroke)[rng.integers(2)]
    for _ in range(rng.integers(1, MOST + 1)):
        shape(ImageDraw.Draw(mask), rng, np.array([width, height]))
    return np.asarray(mask)


def _rectangle(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: np.ndarray) -> None:
    """Sides of an eighth to three quarters of the picture's, wherever they fit."""
    sides = size * rng.uniform(1 / 8, 3 / 4, 2)
    corner = (size - sides) * rng.random(2)
    draw.rectangle([*corner, *(corner + sides)], fill=1)


def _stroke(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: np.ndarray) -> None:
    """A bent line through 2 to 6 points, with round joints, a sixteenth to a quarter of the picture wide."""
    width = size.min() * rng.uniform(1 / 16, 1 / 4)
    points = size * rng.random((rng.integers(2, 7), 2))
    draw.line([*map(tuple, points)], fill=1, width=max(1, round(width)))
    for x, y in points:
        draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=1)
