"""Sources of pictures: where they are, image folders, and how a picture becomes a square."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxkd.data import sources
from tests.data.test_openmoji import SPLITS
from tests.data.test_pictures import square


def image_folder(folder, captions, sizes=None):
    folder.mkdir(exist_ok=True)
    lines = []
    for i, caption in enumerate(captions):
        size = sizes[i] if sizes else (10 + i, 8)
        Image.new("RGB", size, (i, 20, 30)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_data_dir_follows_the_environment(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.delenv("FLAXKD_CACHE", raising=False)
    assert sources.default_data_dir() == Path.home() / ".cache/flaxkd/tfds"
    monkeypatch.setenv("FLAXKD_CACHE", "/a")
    assert sources.default_data_dir() == Path("/a/tfds")
    monkeypatch.setenv("TFDS_DATA_DIR", "/b")
    assert sources.default_data_dir() == Path("/b")


def test_square_resizes_the_shorter_side_and_crops_the_center():
    image = Image.new("RGB", (40, 10), "red")
    image.paste("blue", (15, 0, 25, 10))  # the square in the middle
    assert (square(image, 10) == [0, 0, 255]).all()
    large = square(image, 20)
    assert large.shape == (20, 20, 3) and (large[:, 2:-2] == [0, 0, 255]).all()
    assert square(Image.new("RGBA", (7, 31)), 16).shape == (16, 16, 3)


def test_square_rounds_as_torchvision():
    """Sizes are cut, the crop is rounded to even: resize(24) and center_crop(24) of torchvision 0.29."""
    pixels = np.random.default_rng(0).integers(0, 256, (53, 38, 3), np.uint8)
    image = Image.fromarray(pixels)
    want = image.resize((24, 33), Image.Resampling.BILINEAR).crop((0, 4, 24, 28))
    np.testing.assert_array_equal(square(image, 24), want)


def test_image_folder(tmp_path):
    captions = [f"caption {i}" for i in range(60)]
    folder = image_folder(tmp_path / "mine", captions)
    train, validation = (sources.open_source(str(folder), split, resolution=8) for split in SPLITS)
    found = [source[i] for source in (train, validation) for i in range(len(source))]
    assert sorted(example["caption"] for example in found) == sorted(captions)
    for example in found:
        assert example["image"].shape == (8, 8, 3) and example["image"].dtype == np.uint8
        assert example["image"][0, 0].tolist() == [int(example["caption"].split()[1]), 20, 30]
    assert 0 < len(validation) < 12
    again = sources.open_source(str(folder), "train", resolution=8)
    assert again.fingerprint == train.fingerprint
    assert sources.open_source(str(folder), "train", resolution=16).fingerprint != train.fingerprint
    Image.new("RGB", (90, 90)).save(folder / "0.png")
    Image.new("RGB", (90, 90)).save(folder / "1.png")
    assert sources.open_source(str(folder), "train", resolution=8).fingerprint != train.fingerprint


def test_a_small_folder_has_both_splits(tmp_path):
    folder = image_folder(tmp_path / "few", ["a cat", "a dog", "a dog"])
    sizes = [len(sources.open_source(str(folder), split)) for split in SPLITS]
    assert sum(sizes) == 3 and min(sizes) >= 1
    image_folder(tmp_path / "one", ["a cat", "a cat"])
    with pytest.raises(ValueError, match="one caption only"):
        sources.open_source(str(tmp_path / "one"), "train")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{not json", ValueError, "line 3: not JSON"),
        ("[1]", ValueError, "line 3: a list"),
        ('{"file_name": "0.png"}', ValueError, "line 3: 'text' is missing or empty"),
        ('{"file_name": "0.png", "text": " "}', ValueError, "line 3: 'text' is missing or empty"),
        ('{"text": "a"}', ValueError, "line 3: 'file_name' is missing"),
        ('{"file_name": "gone.png", "text": "a"}', FileNotFoundError, "line 3: there is no file .*gone.png"),
    ],
)
def test_errors_name_the_line(tmp_path, line, error, message):
    folder = image_folder(tmp_path, ["a", "b"])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(error, match=message):
        sources.open_source(str(folder), "train")


def test_a_broken_picture_is_named(tmp_path):
    folder = image_folder(tmp_path, ["a", "b", "c"], sizes=[(64, 64)] * 3)
    for i in range(3):
        whole = (folder / f"{i}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(whole[: len(whole) // 2] if i else b"no picture")
    for split in SPLITS:
        source = sources.open_source(str(folder), split)
        for i in range(len(source)):
            with pytest.raises(ValueError, match=r"metadata.jsonl, line \d: \d.png cannot be read"):
                source[i]


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set 'opnmoji'"):
        sources.open_source("opnmoji", "train")
    with pytest.raises(FileNotFoundError, match="has no metadata"):
        sources.open_source(str(tmp_path), "train")
    with pytest.raises(ValueError, match="'test', must be 'train' or 'validation'"):
        sources.open_source("openmoji", "test")
