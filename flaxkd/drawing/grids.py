"""Labelled grids of pictures, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from flaxkd.drawing.figures import INK
from flaxkd.machine import files

GAP, MARGIN = 6, 10  # pixels
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
    font, small = (ImageFont.load_default(size) for size in (15, 13))
    label = 190
    size = (2 * MARGIN + label + len(columns) * (width + GAP), 2 * MARGIN + 24 + len(rows) * (height + GAP))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (title, images) in enumerate(columns.items()):
        left = MARGIN + label + i * (width + GAP)
        title = end_of(draw, title, width, font)
        draw.text((left + width / 2, MARGIN + 8), title, INK, font, anchor="mm")
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize((width, height), Image.NEAREST if scale > 1 else Image.LANCZOS)
            top = MARGIN + 24 + j * (height + GAP)
            sheet.paste(tile, (left, top))
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline="#d0d7de")
    for j, prompt in enumerate(rows):
        top = MARGIN + 24 + j * (height + GAP)
        text = wrap(draw, prompt, label - 12, small)
        draw.multiline_text((MARGIN, top + height / 2), text, INK, small, anchor="lm")
    sheet.info |= info or {}
    save(sheet, path)


def wrap(draw: ImageDraw.ImageDraw, text: str, width: int, font) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def end_of(draw: ImageDraw.ImageDraw, text: str, width: int, font) -> str:
    """As much of the end of a text as fits into `width` pixels: the end tells one path from another."""
    cut = text
    while draw.textlength(cut, font) > width and len(cut) > 2:
        cut = f"…{cut[2:]}"
    return cut


def save(image: Image.Image, path: Path) -> None:
    """Writes a PNG with the texts of `image.info`, whole or not at all: the old one may be open in a viewer."""
    texts = PngInfo()
    for name, value in image.info.items():
        if isinstance(value, str):
            texts.add_text(name, value)
    with files.whole(path) as scratch:
        image.save(scratch, "PNG", pnginfo=texts)
