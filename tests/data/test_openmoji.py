"""Captions and pictures of OpenMoji."""

import io
import json
import multiprocessing
import subprocess
import sys
from collections import Counter

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
    assert not [c for c in captions.values() if "zero width" in c or "variation selector" in c or "tag latin" in c]


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
