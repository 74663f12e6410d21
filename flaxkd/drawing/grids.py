"""Labelled grids of pictures, as PNG files."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from flaxkd.drawing.figures import INK
from flaxkd.machine import files

GAP, MARGIN, LINE = 6, 10, 17  # pixels
TITLE = 170  # pixels: a column of narrow pictures is at most so wide, for the sake of its title
PAPER = "#ffffff"


def grid(
    columns: Mapping[str, np.ndarray],
    rows: Sequence[str],
    path: Path,
    *,
    scale: int | None = None,
    info: Mapping[str, str] | None = None,
) -> None:
    """Writes a labelled grid. columns: {title: uint8[n, H, W, 3]}. rows: n prompts.

    scale: enlargement of pixels; None: enough for at least 128 pixels. info: texts to write into the PNG."""
    height, width = next(iter(columns.values())).shape[1:3]
    scale = scale or max(1, -(-128 // height))
    height, width = height * scale, width * scale
    title_font, small = font(14), font(13)
    label = 190
    columns = {printable(title): images for title, images in columns.items()}
    cell = max(width, min(math.ceil(max(map(title_font.getlength, columns))), TITLE))
    size = (2 * MARGIN + label + len(columns) * (cell + GAP), 2 * MARGIN + 24 + len(rows) * (height + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (title, images) in enumerate(columns.items()):
        left = MARGIN + label + i * (cell + GAP) + (cell - width) // 2
        title = end_of(draw, title, cell, title_font)
        draw.text((left + width / 2, MARGIN + 8), title, INK, title_font, anchor="mm")
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize((width, height), Image.NEAREST if scale > 1 else Image.LANCZOS)
            top = MARGIN + 24 + j * (height + GAP)
            sheet.paste(tile, (left, top))
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline="#d0d7de")
    for j, prompt in enumerate(rows):
        top = MARGIN + 24 + j * (height + GAP)
        text = wrap(draw, printable(prompt), label - 12, small, most=max(1, height // LINE))
        draw.multiline_text((MARGIN, top + height / 2), text, INK, small, anchor="lm")
    sheet.info |= info or {}
    save(sheet, path)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic and more. Other letters are boxes."""
    import matplotlib  # slow, and only labels need it

    try:
        return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
    except OSError:
        return ImageFont.load_default(size)


def printable(text: str) -> str:
    """What a font can draw: without halves of surrogate pairs, as in names of files that are not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def wrap(draw: ImageDraw.ImageDraw, text: str, width: int, font, most: int | None = None) -> str:
    """A text in lines of at most `width` pixels. A longer word is broken, and `most` lines end with "…"."""
    fits = lambda line: draw.textlength(line, font) <= width
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer):
            lines[-1] = longer
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:  # also the end of a text without spaces, such as Chinese
            lines += [""] * (not fits(lines[-1] + letter) and bool(lines[-1]))
            lines[-1] += letter
    if most is not None and len(lines) > most:
        last = lines[most - 1]
        while last and not fits(f"{last}…"):
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last.rstrip()}…"]
    return "\n".join(lines)


def end_of(draw: ImageDraw.ImageDraw, text: str, width: int, font) -> str:
    """As much of the end of a text as fits into `width` pixels: the end tells one path from another."""
    cut = text
    while draw.textlength(cut, font) > width and len(cut) > 2:
        cut = f"…{cut[2:]}"
    return cut


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG with the texts of `image.info`, whole or not at all: the old one may be open in a viewer."""
    with files.whole(path) as scratch:
        write(image, scratch)


def write(image: Image.Image, file: Path | BinaryIO) -> None:
    """The same into an open file, or as it comes."""
    texts = PngInfo()
    for name, value in image.info.items():
        if isinstance(value, str):
            texts.add_text(name, printable(value))
    image.save(file, "PNG", pnginfo=texts)
