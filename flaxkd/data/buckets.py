"""Aspect-ratio buckets: the sizes to which pictures are cropped. A batch has one size: each is one compiled program."""

import math
from collections.abc import Iterable, Sequence

PRESETS = {  # name: (side in pixels of the square they are meant for, (height, width) in pixels)
    # of SDXL models, in public workflows and model cards
    "sdxl": (1024, ((1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216),
                    (1344, 768), (768, 1344), (1536, 640), (640, 1536))),
}  # fmt: skip
GRID = 64  # pixels: a preset is scaled to multiples of it, so that UNets with three downsamplings halve evenly


def sizes(buckets: str | Iterable[Sequence[int]] | None, resolution: int) -> tuple[tuple[int, int], ...]:
    """The (height, width) in pixels of `config.data.buckets`: a preset's name, the sizes themselves, or None for the
    square of `resolution`.

    A preset is scaled to `resolution`: each side to the nearest multiple of GRID; equal sizes then count once. Raises
    ValueError for another name, and for what is no list of sizes."""
    if buckets is None:
        return ((resolution, resolution),)
    if isinstance(buckets, str):
        if buckets not in PRESETS:
            raise ValueError(f"buckets = {buckets!r} is unknown (known: {', '.join(PRESETS)})")
        side, table = PRESETS[buckets]
        scaled = lambda pixels: max(1, round(pixels * resolution / (side * GRID))) * GRID
        return tuple(dict.fromkeys((scaled(height), scaled(width)) for height, width in table))
    try:
        found = tuple((height, width) for height, width in buckets)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(type(side) is int and side > 0 for size in found for side in size):
        raise ValueError(
            f"buckets = {buckets!r} must be sizes (height, width) in pixels, or one of {', '.join(PRESETS)}"
        )
    return tuple(dict.fromkeys(found))


def nearest(original: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest to a picture's: the first, of several as near."""
    ratio = lambda size: math.log(size[0]) - math.log(size[1])  # a ratio and its inverse are equally far from 1
    return min(sizes, key=lambda size: abs(ratio(size) - ratio(original)))
