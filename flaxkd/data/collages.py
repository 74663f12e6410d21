"""Collages: two pictures of a data set in one, captioned "A and B", from which a model of single things learns two.

Each picture has half the size. The first is on the left, the second on the right, and the rest is the background. Were
the places left to chance, the model would have to guess them where noise prevails. A collage follows from the seed and
its number alone. Its captions are held out by their own hash, in either order: some pairs of captions are never seen
together, though each is seen alone.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

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


def places(height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the two pictures are in one of this size in pixels: rows and columns of each, the first on the left."""
    h, w = height // 2, width // 2
    rows = slice((height - h) // 2, (height - h) // 2 + h)
    return (rows, slice(0, w)), (rows, slice(w, 2 * w))


def half(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture uint8[H, W, 3], resized to cover half the height and width of another, and cropped to it."""
    return pictures.fit(Image.fromarray(image), [(height // 2, width // 2)])[0]


def collage(first: np.ndarray, second: np.ndarray, background: str = "white") -> np.ndarray:
    """uint8[H, W, 3]: two pictures in one as large as the first."""
    height, width, _ = first.shape
    whole = np.full_like(first, pictures.color(background))
    for image, place in zip((first, second), places(height, width), strict=True):
        whole[place] = half(image, height, width)
    return whole


def added(
    source: Source, share: float, split: str, seed: int, background: str = "white", captions: str | None = None
) -> Source:
    """The source with collages of its pictures behind them, `share` times as many as it has pictures.

    split: they are of pairs of captions of this split. captions: a pattern; they are of pictures whose whole captions
    match it, and every other one is one of these pictures as it is: a model that sees such things in pairs alone draws
    them in pairs alone. None: of all pictures, which are seen alone anyway. Raises ValueError for a cache, which has no
    pictures, and if none or one matches."""
    if source.cache is not None:
        raise ValueError(
            f"data.collages = {share:g}: {source.cache} has latents, and collages are made of pictures: give the "
            "folder of pictures, or --config.data.collages=0"
        )
    chosen = range(len(source)) if captions is None else _matching(source, captions)
    more = round(share * len(source))
    text = f"collages 3 {more} {split} {seed} {pictures.color(background)} {captions} {source.fingerprint}"

    def load(index: int) -> dict:
        if index < len(source):
            return source[index]
        number = index - len(source)
        rng = np.random.default_rng([seed, number])
        if captions is not None and number % 2:
            return source[chosen[rng.integers(len(chosen))]]
        first, second = _pair(source, chosen, split, rng)
        image = collage(first["image"], second["image"], background)
        size = image.shape[:2]
        named = caption(first["caption"], second["caption"])
        return {"image": image, "caption": named, "crop": pictures.center(size, size)}

    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return dataclasses.replace(source, size=len(source) + more, load=load, fingerprint=fingerprint, captions=None)


def _matching(source: Source, pattern: str) -> list[int]:
    captions = source.all_captions()
    found = [i for i, text in enumerate(captions) if re.fullmatch(pattern, text)]
    if len(found) < 2:
        raise ValueError(
            f"data.collage_captions = {pattern!r} matches {len(found)} of {len(captions):,} captions as a whole, and a "
            f"collage takes two; one of them is {captions[0]!r}"
        )
    return found


def _pair(source: Source, chosen: Sequence[int], split: str, rng: np.random.Generator) -> tuple[dict, dict]:
    """Two of the chosen examples whose captions may be seen together."""
    for _ in range(TRIES):
        first, second = (source[chosen[i]] for i in rng.integers(len(chosen), size=2))
        if split_of(first["caption"], second["caption"]) == split:
            return first, second
    raise ValueError(f"data.collages: of {TRIES} pairs of captions none is of the {split} split: give more captions")
