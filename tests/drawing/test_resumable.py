"""Pictures are drawn once, whole, and the same whoever draws them."""

import numpy as np
import pytest
from PIL import Image

from flaxkd.drawing import resumable
from flaxkd.pretrained import Folder
from flaxkd.weights.quantize import Quantization

PROMPTS = [f"picture {i}" for i in range(7)]
SETTINGS = {"sampler": "ddim", "steps": 2}


class Drawer:
    """Draws the noise of its pictures, and counts; dies after so many."""

    def __init__(self, pictures=100, shape=(4, 4, 4)):
        self.pictures, self.shape, self.drawn = pictures, shape, []

    def __call__(self, indices):
        for i in indices:
            if self.pictures == 0:
                raise KeyboardInterrupt
            self.pictures -= 1
            self.drawn.append(i)
            noise = np.random.default_rng([3, i]).standard_normal(self.shape, np.float32)
            assert noise.dtype == np.float32
            yield np.uint8(np.clip(noise[..., :3] * 50 + 128, 0, 255))


def draw(folder, drawer, settings=SETTINGS, **options):
    return resumable.draw(folder, PROMPTS, drawer, settings=settings, **options)


def content(paths):
    return [path.read_bytes() for path in paths]


def test_it_goes_on_where_it_was_killed(tmp_path):
    whole = content(draw(tmp_path / "whole", Drawer()))
    with pytest.raises(KeyboardInterrupt):
        draw(tmp_path / "killed", Drawer(pictures=4))
    (tmp_path / "killed" / ".000004.png").write_bytes(b"half")  # what a kill leaves behind
    drawer = Drawer()
    assert content(draw(tmp_path / "killed", drawer)) == whole
    assert drawer.drawn == [4, 5, 6]
    drawer = Drawer()
    assert content(draw(tmp_path / "killed", drawer)) == whole and not drawer.drawn


def test_processes_share_the_prompts_out(tmp_path):
    whole = content(draw(tmp_path / "one", Drawer()))
    drawers = [Drawer(), Drawer(), Drawer()]
    for i, drawer in enumerate(drawers):
        paths = draw(tmp_path / "three", drawer, process_index=i, process_count=3)
    assert content(paths) == whole
    assert drawers[1].drawn == [1, 4]


def test_pictures_of_other_settings_are_refused(tmp_path):
    draw(tmp_path, Drawer())
    with pytest.raises(ValueError, match=r"steps: 2 there, 3 here\n  weights: None there, 'x' here\nRemove"):
        draw(tmp_path, Drawer(), {"sampler": "ddim", "steps": 3, "weights": "x"})


def test_pictures_are_resized_and_kept_as_asked(tmp_path):
    paths = draw(tmp_path, Drawer(shape=(8, 8, 4)), size=4, suffix=".jpg")
    with Image.open(paths[0]) as picture:
        assert picture.size == (4, 4) and picture.format == "JPEG"
    assert resumable.read(paths[0], 2).shape == (2, 2, 3)
    paths[0].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"000000.jpg cannot be read"):
        resumable.read(paths[0])


def test_another_weight_is_another_fingerprint():
    params = {"unet": {"a": np.ones(3, np.float32), "b": {"c": np.zeros(2, np.float16)}}}
    same = {"unet": {"b": {"c": np.zeros(2, np.float16)}, "a": np.ones(3, np.float32)}}
    assert resumable.fingerprint(params) == resumable.fingerprint(same)
    same["unet"]["a"] = np.float32([1, 1, 1.0001])
    assert resumable.fingerprint(params) != resumable.fingerprint(same)


def test_a_fingerprint_tells_what_leaves_the_weights_alone(tiny_xl):
    """The layers of SDXL's text encoders that are left out are in their configuration alone."""
    folder = Folder.open(tiny_xl)
    skips = folder.replace({"text_encoder_2": folder.family.skip(folder.config("text_encoder_2"), 1)}, {})
    models = folder, Folder.open(tiny_xl), skips, folder.as_quantized(Quantization("w8"))
    marks = [resumable.fingerprint({}, model) for model in models]
    assert marks[0] == marks[1] and len({*marks}) == 3
