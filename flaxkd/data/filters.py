"""Which pictures of a large set are kept, and in what form: filters, captions, decoding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flaxkd.data import buckets, openmoji, pictures
from flaxkd.data.chunks import Item, pick
from flaxkd.data.metadata import CAPTIONS

AESTHETIC = ("aesthetic", "aesthetic_score")
WIDTHS, HEIGHTS = ("original_width",), ("original_height",)  # recorded by img2dataset before it resizes


@dataclass(frozen=True)
class Recipe:
    """What to keep of a source, and how."""

    resolution: int  # pixels per side: the shorter side is resized to it, then the center is cropped
    # sizes (height, width) in pixels, in place of squares: a picture goes to the nearest, see buckets.py
    buckets: tuple[tuple[int, int], ...] | None = None
    flip: bool = False  # also keep mirrored pictures, in `train` alone
    validation: float = openmoji.VALIDATION_SHARE  # share of the captions, chosen by hash: equal captions stay together
    min_aesthetic: float | None = None  # score, on the source's scale
    min_size: int | None = None  # pixels of the shorter side, before any resizing recorded in the source
    background: str = "white"  # color behind transparent pixels
    caption_column: str | None = None  # None: the first of `CAPTIONS`
    aesthetic_column: str | None = None  # None: the first of `AESTHETIC`


class Example(NamedTuple):
    name: str
    image: np.ndarray  # uint8[H, W, 3]
    caption: str
    crop: pictures.Crop


class Left(NamedTuple):
    """An item left out: filtered on request (only counted), or skipped as faulty (counted and listed)."""

    name: str
    kind: str
    reason: str
    detail: str = ""


def prepare(item: Item, recipe: Recipe) -> Example | Left:
    """Filters, decodes and crops an item. Cheap checks come first."""
    left = lambda *reason: Left(item.name, *reason)
    columns = lambda flag: f"it has {', '.join(map(str, item.about)) or 'no columns'}: name one by {flag}"
    if item.fault:
        return left("skipped", *item.fault)
    if recipe.min_aesthetic is not None:
        score = _number(item.about, recipe.aesthetic_column, AESTHETIC)
        if score is None:
            return left("skipped", "no aesthetic score", columns("--aesthetic-column"))
        if not score >= recipe.min_aesthetic:
            return left("filtered", f"aesthetic score below {recipe.min_aesthetic:g}")
    size = [_number(item.about, None, names) for names in (WIDTHS, HEIGHTS)]
    small = left("filtered", f"shorter side below {recipe.min_size} pixels")
    if recipe.min_size and None not in size and min(size) < recipe.min_size:
        return small
    if item.image is None:
        return left("skipped", "no picture")
    try:
        caption = caption_of(item.about, recipe.caption_column)
    except ValueError as error:
        return left("skipped", "no caption", str(error))
    if caption is None:
        return left("skipped", "no caption", columns("--caption-column"))
    try:
        with pictures.opened(item.image() if callable(item.image) else item.image) as image:
            if recipe.min_size and None in size and min(image.size) < recipe.min_size:
                return small
            sizes = buckets.sizes(recipe.buckets, recipe.resolution)
            image, crop = pictures.fit(image, sizes, recipe.background)
            return Example(item.name, image, caption, crop)
    except Exception as error:  # any kind: decoders raise all sorts of errors on damaged pictures
        if pictures.passing(error):
            raise
        return left("skipped", "unreadable picture", f"{type(error).__name__}: {error}")


def caption_of(about: Mapping[str, Any], column: str | None) -> str | None:
    """The caption among a picture's fields; None if there is none. Raises ValueError for one that is no text."""
    caption = pick(about, column, CAPTIONS)
    if not isinstance(caption, str) or not caption.strip():
        return None
    caption.encode()  # JSON can hold half a character
    return caption.strip()


def _number(about: Mapping[str, Any], column: str | None, usual: tuple[str, ...]) -> float | None:
    try:
        return float(pick(about, column, usual))
    except (TypeError, ValueError, OverflowError):  # the last for an integer of 400 digits
        return None
