"""Picture files: which are known, and how one of any mode, depth and shape becomes 8-bit RGB of a given size."""

import errno
import functools
import io
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps

from flaxkd.data import buckets

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
# Of a picture this many times longer than it has to be only the middle is resized, for the sake of memory.
EXTREME = 8


# Errors of a disk or a network, and not of a picture.
PASSING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ETIMEDOUT,
           errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.EHOSTUNREACH, errno.ENETUNREACH}  # fmt: skip


def passing(error: Exception) -> bool:
    """Whether a picture may well be readable the next time. A decoder's errors have no number."""
    return isinstance(error, OSError) and error.errno in PASSING


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


class Crop(NamedTuple):
    """Where a picture of one size is in another, which it covers: each is (height, width) in pixels."""

    original: tuple[int, int]  # as read, upright, before it was resized
    resized: tuple[int, int]
    corner: tuple[int, int]  # top and left of what is kept, after the picture was resized
    size: tuple[int, int]  # of what is kept

    @property
    def mirrored(self) -> "Crop":
        """The same part of the mirrored picture."""
        top, left = self.corner
        return self._replace(corner=(top, self.resized[1] - self.size[1] - left))

    @property
    def time_ids(self) -> np.ndarray:
        """int32[6], as Stable Diffusion XL reads them: original size, corner and size."""
        return np.array([*self.original, *self.corner, *self.size], np.int32)


def center(original: tuple[int, int], size: tuple[int, int]) -> Crop:
    """The center of a picture resized to cover `size` (height, width), and no larger."""
    (h, w), (height, width) = original, size
    resized = (height, height * w // h) if height * w >= width * h else (width * h // w, width)
    top, left = (round((whole - kept) / 2) for whole, kept in zip(resized, size, strict=True))
    return Crop(original, resized, (top, left), size)


def fit(image: Image.Image, sizes: Sequence[tuple[int, int]], background: str = "white") -> tuple[np.ndarray, Crop]:
    """(uint8[H, W, 3], where it was cropped): resized to cover (bilinear) one of `sizes` (height, width), then center
    cropped to it. It is the size whose aspect ratio is the nearest: see `buckets.nearest`.

    Grey of 16 or 32 bits is scaled to 8. Transparent pixels show the `background`."""
    read = image
    if image.getexif().get(0x0112, 1) != 1:  # orientation
        image = ImageOps.exif_transpose(image)
    width, height = image.size
    size = buckets.nearest((height, width), sizes)
    crop = center((height, width), size)
    most = EXTREME * min(image.size) * max(size) // min(size)
    if max(image.size) > most:
        width, height = (min(side, most) for side in image.size)
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
    _, (rows, columns), (top, left), (height, width) = center((height, width), size)  # of the middle, if it is extreme
    image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + width, top + height))), crop


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
