"""Collages: what is in one, which pairs are held out, and that they follow from the seed."""

import dataclasses

import numpy as np
import pytest

from configs import small
from flaxkd import train
from flaxkd.data import collages, loader, sources
from tests.data.test_records import ensure
from tests.data.test_sources import image_folder


@pytest.fixture
def source(tmp_path):
    """Pictures of one color each, named by their red."""
    folder = image_folder(tmp_path / "pictures", [f"red {i}" for i in range(40)])
    return sources.open_source(str(folder), "train", resolution=16)


def test_a_collage_has_both_pictures_in_half_their_size_on_the_background():
    first, second = (np.full((16, 24, 3), value, np.uint8) for value in (10, 200))
    want = np.zeros((16, 24, 3), np.uint8)
    want[4:12, :12], want[4:12, 12:] = 10, 200
    np.testing.assert_array_equal(collages.collage(first, second, "black"), want)


def test_collages_are_added_and_named_by_both_captions(source):
    made = collages.added(source, 1.5, "train", seed=0)
    n = len(source)
    assert len(made) == n + round(1.5 * n)
    np.testing.assert_array_equal(made[3]["image"], source[3]["image"])
    captions = set()
    for i in range(n, len(made)):
        example = made[i]
        first, second = example["caption"].split(" and ")
        for name, place in zip((first, second), collages.places(16, 16), strict=True):
            assert (example["image"][place][..., 0] == int(name.removeprefix("red "))).all()
        assert collages.split_of(first, second) == collages.split_of(second, first) == "train"
        captions.add(example["caption"])
        assert example["crop"].size == (16, 16)
    assert len(captions) > 0.9 * (len(made) - n)


def test_collages_follow_from_the_seed(source):
    made, again, other = (collages.added(source, 1, "train", seed) for seed in (0, 0, 1))
    captions = lambda source: [source[i]["caption"] for i in range(len(source))]
    assert captions(made) == captions(again) != captions(other)
    assert made.fingerprint == again.fingerprint
    prints = {source.fingerprint, made.fingerprint, other.fingerprint}
    prints |= {collages.added(source, *given).fingerprint for given in ((0.5, "train", 0), (1, "train", 0, "black"))}
    assert len(prints) == 5


def test_their_cache_is_the_same_again_and_batches_go_on_from_a_position(tmp_path):
    folder = image_folder(tmp_path / "pictures", [f"red {i}" for i in range(40)])
    source = collages.added(sources.open_source(str(folder), "train", resolution=8), 1, "train", seed=0)
    first, again = (ensure(source, tmp_path / name) for name in "ab")
    content = lambda cache: {file.name: file.read_bytes() for file in cache.iterdir()}
    assert first.name == again.name and content(first) == content(again)
    batches = loader.Records(first).batches(8, seed=0)
    next(batches)
    position, want = batches.get_state(), next(batches)
    resumed = loader.Records(again).batches(8, seed=0)
    resumed.set_state(position)
    np.testing.assert_array_equal(next(resumed)["moments"], want["moments"])


def test_a_training_has_them_and_its_validation_has_not(source, tmp_path):
    config = small.get_config()
    config.data.update(source=str(tmp_path / "pictures"), resolution=16, collages=0.5, background="black")
    config.seed = 3
    held_out, made = (train.open_pictures(config, split) for split in ("validation", "train"))
    assert len(made) == len(source) + round(len(source) / 2) and len(held_out) == 40 - len(source)
    want = collages.added(source, 0.5, "train", 3, "black")[len(source)]
    np.testing.assert_array_equal(made[len(source)]["image"], want["image"])
    assert made[len(source)]["caption"] == want["caption"]


def test_a_cache_and_pairs_that_are_all_held_out_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"data.collages = 0.5: .* has latents"):
        collages.added(dataclasses.replace(source, cache=tmp_path), 0.5, "train", seed=0)
    alone = next(name for name in map(str, range(999)) if collages.split_of(name, name) == "validation")
    same = dataclasses.replace(source, load=lambda i: {"caption": alone, "image": None})
    with pytest.raises(ValueError, match="none is of the train split: give more captions"):
        collages.added(same, 1, "train", seed=0)[len(same)]


def test_a_pattern_chooses_whose_pictures_they_are_of(source):
    made = collages.added(source, 1, "train", 0, captions=r"red \d")
    lengths = [len(made[i]["caption"]) for i in range(len(source), len(made))]
    assert {*lengths[::2]} == {len("red 1 and red 2")} and {*lengths[1::2]} == {len("red 1")}
    with pytest.raises(ValueError, match=r"data.collage_captions = 'blue' matches 0 of \d+ captions as a whole"):
        collages.added(source, 1, "train", 0, captions="blue")
