"""Picture files: which are known, and how one of any mode, depth and shape becomes a square of 8-bit RGB."""

import functools
import io
import logging
import os

import numpy as np
from PIL import Image, ImageColor, ImageOps

FORMATS = {  # Pillow's name of a format: its endings. Formats that start other programs (EPS) are not among them.
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
}
FOREIGN = (".heic", ".heif", ".jxl")  # pictures that Pillow does not decode; they are listed as unreadable
ENDINGS = (*(ending for endings in FORMATS.values() for ending in endings), *FOREIGN)

# White in grey pictures whose files do not say what it is: the least of these that holds all values.
WHITE = (1, 2**8 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1)
EXTREME = 8  # of a picture longer than this many times its width only the middle is resized, for the sake of memory


class Unreadable(ValueError):
    """A picture that cannot be decoded: damaged, cut off, or no picture."""


def report_unreadable(faults: list[str], total: int, show: bool = True) -> None:
    """Names the unreadable ones of `total` pictures in one warning. Raises ValueError if no other is left."""
    if faults and len(faults) == total:
        raise ValueError(f"no picture is left, all {total:,} are unreadable:\n{shown(faults)}")
    if faults and show:
        logging.warning("%d of %d pictures are left out:\n%s", len(faults), total, shown(faults))


def shown(faults: list[str], limit: int = 50) -> str:
    """The first faults of a list, one a line, and the number of the others."""
    more = f"\nand {len(faults) - limit:,} more" if len(faults) > limit else ""
    return "\n".join(faults[:limit]) + more


def is_picture(name: str) -> bool:
    """Whether a file is a picture, by its name. What macOS puts beside one is not."""
    _, _, last = name.rpartition("/")
    return name.lower().endswith(ENDINGS) and not last.startswith("._") and "__MACOSX/" not in name


def color(name: str) -> tuple[int, int, int]:
    """A color as "white" or "#ffcc00". Raises ValueError for another."""
    try:
        return ImageColor.getrgb(name)[:3]
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f'the background is {name!r}, must be a color such as "white" or "#ffcc00"') from None


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF


def opened(content: bytes | os.PathLike) -> Image.Image:
    """The picture of a file, or of a file's bytes. Of an animation it is the first frame. Raises as Pillow does."""
    return Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=_formats())


def square(image: Image.Image, resolution: int, background: str = "white") -> np.ndarray:
    """Shorter side resized to `resolution` (bilinear), center cropped: uint8[resolution, resolution, 3].

    Grey of 16 or 32 bits is scaled to 8. Transparent pixels show the `background`."""
    short, read = min(image.size), image
    if image.getexif().get(0x0112, 1) != 1:  # orientation
        image = ImageOps.exif_transpose(image)
    if max(image.size) > EXTREME * short:
        width, height = (min(side, EXTREME * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    image.load()  # transparency may be known only then
    if image.mode[0] in "IF":
        image = Image.fromarray(_eight_bits(np.asarray(image), read))
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, color(background))
        below.alpha_composite(image.convert("RGBA"))
        image = below
    image = image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    if (width, height) != (resolution, resolution):
        width, height = resolution * width // short, resolution * height // short
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - resolution) / 2), round((height - resolution) / 2)
        image = image.crop((left, top, left + resolution, top + resolution))
    return np.asarray(image)


def _eight_bits(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Grey values of 12, 16 or 32 bits as uint8, black to white. image: as read, whose tags say what white is."""
    tags = getattr(image, "tag_v2", {})
    bits, signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 2
    if bits == 32 and not signed and values.dtype == np.int32:  # Pillow has no unsigned 32 bits
        values = values.view(np.uint32)
    if bits == 32 or image.mode == "F":
        values = np.nan_to_num(values) if image.mode == "F" else values
        low, high = min(float(values.min()), 0), float(values.max())
        white = next((white for white in WHITE if white >= high), high)
        # Far below it, a picture was meant brighter: 1.3 of 255 is the highlight of one whose white is 1.
        white = high if low < 0 or 1 < high < white / 64 else white
    else:
        low, white = min(float(values.min()), 0), 2 ** (bits - signed) - 1
    values = np.rint((values.astype(np.float32) - low) * (255 / max(white - low, 1e-30))).clip(0, 255).astype(np.uint8)
    return 255 - values if tags.get(262) == 0 else values  # "white is zero"
