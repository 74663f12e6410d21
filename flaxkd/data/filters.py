"""Which pictures of a large set are kept, and as what: filters, captions, decoding."""

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
)  # usual names, the first that is there counts
AESTHETIC = ("aesthetic", "aesthetic_score")
WIDTHS, HEIGHTS = ("original_width",), ("original_height",)  # as img2dataset notes them before it resizes


@dataclass(frozen=True)
class Recipe:
    """What of a source is kept, and how."""

    resolution: int  # pixels a side: the shorter side is resized to it, then the center is cropped
    flip: bool = False  # keep the mirrored pictures of `train` too
    validation: float = (
        openmoji.VALIDATION_SHARE
    )  # of the captions, by their hash: equal captions stay together
    min_aesthetic: float | None = None  # score, as the source has it
    min_size: int | None = None  # pixels of the shorter side, before any resizing that the source tells of
    caption_column: str | None = None  # None: the first of `CAPTIONS`
    aesthetic_column: str | None = None  # None: the first of `AESTHETIC`


class Example(NamedTuple):
    name: str
    image: np.ndarray  # uint8[r, r, 3]
    caption: str


class Left(NamedTuple):
    """What is not kept: by wish (filtered, only counted) or because it is at fault (skipped, counted and listed)."""

    name: str
    kind: str
    reason: str
    detail: str = ""


def prepare(item: Item, recipe: Recipe) -> Example | Left:
    """An item filtered, decoded and cut. What is cheap comes first."""
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
    except Exception as error:  # of any kind: decoders that meet damage raise whatever they stumble over
        return left("skipped", "unreadable picture", f"{type(error).__name__}: {error}")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
