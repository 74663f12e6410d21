"""Which pictures of a large set are kept, and in what form: filters, captions, decoding."""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flaxkd.data import openmoji, sources
from flaxkd.data.chunks import Item, pick

CAPTIONS = (
    "txt",
    "caption",
    "text",
    "prompt",
    "captions/text",
)  # usual names; the first one present counts
AESTHETIC = ("aesthetic", "aesthetic_score")
WIDTHS, HEIGHTS = ("original_width",), ("original_height",)  # recorded by img2dataset before it resizes


@dataclass(frozen=True)
class Recipe:
    """What to keep of a source, and how."""

    resolution: int  # pixels per side: the shorter side is resized to it, then the center is cropped
    flip: bool = False  # also keep mirrored pictures, in `train` alone
    validation: float = openmoji.VALIDATION_SHARE  # share of the captions, chosen by hash: equal captions stay together
    min_aesthetic: float | None = None  # score, on the source's scale
    min_size: int | None = None  # pixels of the shorter side, before any resizing recorded in the source
    caption_column: str | None = None  # None: the first of `CAPTIONS`
    aesthetic_column: str | None = None  # None: the first of `AESTHETIC`


class Example(NamedTuple):
    name: str
    image: np.ndarray  # uint8[r, r, 3]
    caption: str


class Left(NamedTuple):
    """An item left out: filtered on request (only counted), or skipped as faulty (counted and listed)."""

    name: str
    kind: str
    reason: str
    detail: str = ""


def prepare(item: Item, recipe: Recipe) -> Example | Left:
    """Filters, decodes and crops an item. Cheap checks come first."""
    left = lambda *reason: Left(item.name, *reason)
    if recipe.min_aesthetic is not None:
        score = _number(pick(item.about, recipe.aesthetic_column, AESTHETIC))
        if score is None:
            return left("skipped", "no aesthetic score")
        if not score >= recipe.min_aesthetic:
            return left("filtered", f"aesthetic score below {recipe.min_aesthetic:g}")
    size = [_number(pick(item.about, None, names)) for names in (WIDTHS, HEIGHTS)]
    small = left("filtered", f"shorter side below {recipe.min_size} pixels")
    if recipe.min_size and None not in size and min(size) < recipe.min_size:
        return small
    if item.image is None:
        return left("skipped", "no picture")
    caption = pick(item.about, recipe.caption_column, CAPTIONS)
    if not isinstance(caption, str) or not caption.strip():
        return left("skipped", "no caption")
    try:
        with Image.open(io.BytesIO(item.image() if callable(item.image) else item.image)) as image:
            if recipe.min_size and None in size and min(image.size) < recipe.min_size:
                return small
            return Example(item.name, sources.square(image, recipe.resolution), caption.strip())
    except Exception as error:  # any kind: decoders raise all sorts of errors on damaged pictures
        return left("skipped", "unreadable picture", f"{type(error).__name__}: {error}")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
