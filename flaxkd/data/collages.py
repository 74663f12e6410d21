"""Collages: two pictures of a data set in one, captioned "A and B", from which a model of single things learns two.

Each picture has half the size. They are beside each other or one above the other, and the rest is the background.
A collage follows from the seed and its number alone. Its captions are held out by their own hash, in either order: some
pairs of captions are never seen together, though each is seen alone.
"""

import dataclasses
import hashlib

import numpy as np
from PIL import Image

from flaxkd.data import openmoji, pictures
from flaxkd.data.sources import Source

TRIES = 1000  # to find two captions that are not held out: one pair in 20 is


def split_of(first: str, second: str) -> str:
    """The split of two captions in one picture, "train" or "validation" (about 5 %): the same in either order."""
    return openmoji.split_of(caption(*sorted((first, second))))


def caption(first: str, second: str) -> str:
    return f"{first} and {second}"


def places(height: int, width: int, above: bool) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the two pictures are in one of this size in pixels: rows and columns of each. above: not side by side."""
    h, w = height // 2, width // 2
    middle = (height - h) // 2, (width - w) // 2
    if above:
        columns = slice(middle[1], middle[1] + w)
        return (slice(0, h), columns), (slice(h, 2 * h), columns)
    rows = slice(middle[0], middle[0] + h)
    return (rows, slice(0, w)), (rows, slice(w, 2 * w))


def half(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8[H, W, 3], resized to cover half the height and width of another, and cropped to it."""
    return pictures.fit(Image.fromarray(image), [(height // 2, width // 2)])[0]


def collage(first: np.ndarray, second: np.ndarray, above: bool, background: str = "white") -> np.ndarray:
    """uint8[H, W, 3]: two pictures in one as large as the first."""
    height, width, _ = first.shape
    whole = np.full_like(first, pictures.color(background))
    for image, place in zip((first, second), places(height, width, above), strict=True):
        whole[place] = half(image, height, width)
    return whole


def added(source: Source, share: float, split: str, seed: int, background: str = "white") -> Source:
    """The source with collages of its pictures behind them, `share` times as many as it has pictures.

    split: they are of pairs of captions of this split. Raises ValueError for a cache, which has no pictures."""
    if source.cache is not None:
        raise ValueError(
            f"data.collages = {share:g}: {source.cache} has latents, and collages are made of pictures: give the "
            "folder of pictures, or --config.data.collages=0"
        )
    number = round(share * len(source))
    text = f"collages 1 {number} {split} {seed} {pictures.color(background)} {source.fingerprint}"

    def load(index: int) -> dict:
        if index < len(source):
            return source[index]
        rng = np.random.default_rng([seed, index - len(source)])
        first, second = _pair(source, split, rng)
        image = collage(first["image"], second["image"], bool(rng.integers(2)), background)
        size = image.shape[:2]
        named = caption(first["caption"], second["caption"])
        return {"image": image, "caption": named, "crop": pictures.center(size, size)}

    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return dataclasses.replace(source, size=len(source) + number, load=load, fingerprint=fingerprint, captions=None)


def _pair(source: Source, split: str, rng: np.random.Generator) -> tuple[dict, dict]:
    """Two examples of a source whose captions may be seen together."""
    for _ in range(TRIES):
        first, second = (source[int(i)] for i in rng.integers(len(source), size=2))
        if split_of(first["caption"], second["caption"]) == split:
            return first, second
    raise ValueError(f"data.collages: of {TRIES} pairs of captions none is of the {split} split: give more captions")
