"""Data: captions and pictures of OpenMoji, and image folders."""

import io
import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flaxkd.data import openmoji, sources

SPLITS = ("train", "validation")

NO_TENSORFLOW = """
import sys
from flaxkd.data import records, loader, openmoji, sources
from pathlib import Path
builder = openmoji.build(Path(sys.argv[1]), limit=40)
source = sources.open_source("openmoji", "train", sys.argv[1])
assert source[0]["image"].shape == (64, 64, 3)
import tensorflow_datasets as tfds
assert len(tfds.data_source("openmoji", split="train", data_dir=sys.argv[1])) == len(source)
assert "tensorflow" not in sys.modules and "torch" not in sys.modules and "flax" not in sys.modules
print(len(source))
"""


def image_folder(folder, captions, sizes=None):
    folder.mkdir(exist_ok=True)
    lines = []
    for i, caption in enumerate(captions):
        size = sizes[i] if sizes else (10 + i, 8)
        Image.new("RGB", size, (i, 20, 30)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A small OpenMoji, built in a process that may not import TensorFlow."""
    folder = tmp_path_factory.mktemp("tfds")
    done = subprocess.run([sys.executable, "-c", NO_TENSORFLOW, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40/40" in done.stderr and "pictures/s" in done.stderr  # the bar: count, rate, time left
    return folder


def test_captions_are_words_and_unique():
    names = openmoji.short_names()
    captions = {file.stem: openmoji.caption_of(file.stem, names) for file in openmoji.svg_files()}
    assert len(captions) == 4495
    assert [c for c, n in Counter(captions.values()).items() if n > 1] == []
    assert all(c == c.lower().strip() and "_" not in c and "symbol" != c for c in captions.values())
    assert captions["1F3C3-1F3FE-200D-2640-FE0F"] == "woman running: medium-dark skin tone"
    tones = "people holding hands: light skin tone, dark skin tone"
    assert captions["1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF"] == tones
    assert captions["1F468-1F3FE-200D-1F9B0"] == "man: medium-dark skin tone, red hair"
    assert captions["1F1EB-1F1F7"] == "flag: france"
    assert captions["1F3F4-E0075-E0073-E0063-E0061-E007F"] == "flag: california"
    assert captions["E000"] == "goldfish"  # OpenMoji's own
    assert captions["2654"] == "white chess king"  # Unicode's name
    assert openmoji.caption_of("2654-200D-2655-FE0F", names) == "white chess king, white chess queen"
    assert not [
        c for c in captions.values() if "zero width" in c or "variation selector" in c or "tag latin" in c
    ]


def test_split_depends_on_the_caption_only():
    captions = [f"caption {i}" for i in range(4000)]
    share = np.mean([openmoji.split_of(caption) == "validation" for caption in captions])
    assert 0.04 < share < 0.06
    assert openmoji.split_of("grinning face") == "train"
    assert openmoji.split_of("volcano") == "validation"  # pinned: another rule would leak what is held out


def test_pictures_are_drawn_on_white():
    drawn = list(openmoji.pictures(limit=3))
    files = openmoji.svg_files()
    assert [name for name, _, _ in drawn] == [files[i].stem for i in (0, 4495 // 3, 4495 * 2 // 3)]
    for _, _, png in drawn:
        image = Image.open(io.BytesIO(png))
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert np.asarray(image).std() > 20


def test_openmoji_is_split_by_caption_and_carries_its_licence(data_dir):
    train, validation = (sources.open_source("openmoji", split, data_dir) for split in SPLITS)
    assert len(train) + len(validation) == 40 and len(validation) > 0
    drawn = {caption: png for _, caption, png in openmoji.pictures(limit=40)}
    for split, source in (("train", train), ("validation", validation)):
        for i in range(len(source)):
            example = source[i]
            assert openmoji.split_of(example["caption"]) == split
            np.testing.assert_array_equal(example["image"], Image.open(io.BytesIO(drawn[example["caption"]])))
    assert train.fingerprint != validation.fingerprint
    assert sources.open_source("openmoji", "train", data_dir, 32)[0]["image"].shape == (32, 32, 3)
    about = json.loads((data_dir / "openmoji/1.0.0/dataset_info.json").read_text())
    assert "CC BY-SA 4.0" in about["description"] and "OpenMoji" in about["description"]
    with pytest.raises(IndexError, match="of"):
        train[len(train)]


def test_several_processes_build_openmoji_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=openmoji.build, args=(tmp_path, 20)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["openmoji"]  # no temporary folder is left
    assert sum(len(sources.open_source("openmoji", split, tmp_path)) for split in SPLITS) == 20


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
    assert (sources.square(image, 10) == [0, 0, 255]).all()
    large = sources.square(image, 20)
    assert large.shape == (20, 20, 3) and (large[:, 2:-2] == [0, 0, 255]).all()
    assert sources.square(Image.new("RGBA", (7, 31)), 16).shape == (16, 16, 3)


def test_square_rounds_as_torchvision():
    """Sizes are cut, the crop is rounded to even: resize(24) and center_crop(24) of torchvision 0.29."""
    pixels = np.random.default_rng(0).integers(0, 256, (53, 38, 3), np.uint8)
    image = Image.fromarray(pixels)
    want = image.resize((24, 33), Image.Resampling.BILINEAR).crop((0, 4, 24, 28))
    np.testing.assert_array_equal(sources.square(image, 24), want)


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
