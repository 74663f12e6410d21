"""How a picture of any mode, depth and shape becomes 8-bit RGB of a size."""

import io
import resource

import numpy as np
import pytest
from PIL import Image

from flaxkd.data import pictures


def plain(image, resolution):
    """The square of an ordinary picture, as it was before any other was known."""
    image = image.convert("RGB")
    if image.size != (resolution, resolution):
        short = min(image.size)
        width, height = (resolution * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - resolution) / 2), round((height - resolution) / 2)
        image = image.crop((left, top, left + resolution, top + resolution))
    return np.asarray(image)


def square(image, resolution, background="white"):
    return pictures.fit(image, [(resolution, resolution)], background)[0]


def noise(width, height, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def read(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return pictures.opened(content.getvalue())


@pytest.mark.parametrize("size", [(24, 24), (53, 38), (24, 191), (300, 41), (7, 5)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "YCbCr"])
def test_ordinary_pictures_are_as_they_were(size, mode):
    image = Image.fromarray(noise(*size)).convert(mode)
    np.testing.assert_array_equal(square(image, 24), plain(image, 24))
    opaque = Image.fromarray(np.dstack([noise(*size), np.full(size[::-1], 255, np.uint8)]))
    np.testing.assert_array_equal(square(opaque, 24), plain(opaque, 24))


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "PPM"),
        ((RAMP * 65535).astype(">u2"), "TIFF"),
        ((RAMP * 255).astype(np.int32), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 1.3).astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 65535).astype(np.float32), "TIFF"),
        ((RAMP - 0.5).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "PPM"),
    ],
)
def test_more_than_eight_bits_are_scaled(values, kind):
    found = square(read(Image.fromarray(values), kind), 64)
    np.testing.assert_allclose(found[..., 0], RAMP * 255, atol=1)
    assert (found[..., :1] == found).all()


def test_unsigned_32_bits():
    content = io.BytesIO()
    Image.fromarray((RAMP * (2**32 - 1)).astype(np.uint32)).save(content, "TIFF")
    signed = b"\x53\x01\x03\x00\x01\x00\x00\x00\x02"  # its tag SampleFormat, as Pillow writes it
    assert signed in content.getvalue()
    image = pictures.opened(content.getvalue().replace(signed, signed[:-1] + b"\x01"))
    np.testing.assert_allclose(square(image, 64)[..., 0], RAMP * 255, atol=1)


def test_a_dark_picture_of_16_bits_stays_dark():
    dark = Image.fromarray(np.full((8, 8), 6553, np.uint16))
    assert (square(read(dark, "PNG"), 8) == 25).all()
    holes = np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32)
    assert square(read(Image.fromarray(holes), "TIFF"), 64).max() <= 255


@pytest.mark.parametrize("background", ["white", "#ff8800"])
def test_transparency_shows_the_background(background):
    want = pictures.color(background)
    alpha = np.zeros((24, 24), np.uint8)
    alpha[8:16, 8:16] = 255
    rgba = Image.fromarray(np.dstack([noise(24, 24), alpha]))
    grey = Image.fromarray(np.dstack([noise(24, 24, 1), alpha]), "LA")
    palette = Image.fromarray(noise(24, 24)).quantize(16)
    for image, kind, options in (
        (rgba, "PNG", {}),
        (rgba, "GIF", {}),
        (rgba, "TIFF", {}),
        (grey, "PNG", {}),
        (palette, "PNG", {"transparency": bytes(16)}),
    ):
        found = square(read(image, kind, **options), 24, background)
        assert (found[0, 0] == want).all() and (found[-1, -1] == want).all()
    found = square(read(rgba, "WEBP", lossless=True), 24, background)
    np.testing.assert_array_equal(found[8:16, 8:16], noise(24, 24)[8:16, 8:16])
    keyed = Image.fromarray(np.full((8, 8, 3), 7, np.uint8))
    assert (square(read(keyed, "PNG", transparency=(7, 7, 7)), 8, background) == want).all()
    with pytest.raises(ValueError, match="background is 'whit', must be a color"):
        pictures.color("whit")


@pytest.mark.parametrize("size", [(100_000, 4), (1, 30_000), (3, 50_000)])
def test_extreme_shapes_are_cropped_first(size):
    image = Image.new("RGB", size, "red")
    middle = tuple(side // 2 for side in size)
    image.paste("blue", (middle[0] - 40, middle[1] - 40, middle[0] + 40, middle[1] + 40))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = square(read(image, "PNG"), 256)
    assert found.shape == (256, 256, 3) and (found == [0, 0, 255]).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; resized first it would be 2 GB


def test_a_camera_held_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(noise(40, 20))
    found = square(read(image, "PNG", exif=exif), 20)
    np.testing.assert_array_equal(found, plain(image.transpose(Image.Transpose.ROTATE_270), 20))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    found = square(read(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True), 8)
    assert (found == [255, 0, 0]).all()


@pytest.mark.parametrize("name", ["a.JPEG", "b/a.jfif", "a.avif", "a.TIF", "a.webp", "a.b.png", "a.heic", "a.jp2"])
def test_endings_of_pictures(name):
    assert pictures.is_picture(name)
    assert not pictures.is_picture(f"{name}.txt") and not pictures.is_picture(f"x/._{name.rpartition('/')[2]}")
