"""Collages: what is in one, which pairs are held out, and that they follow from the seed."""

import dataclasses

import numpy as np
import pytest

from flaxkd.data import collages, sources
from tests.data.test_sources import image_folder


@pytest.fixture
def source(tmp_path):
    """Pictures of one color each, named by their red."""
    folder = image_folder(tmp_path / "pictures", [f"red {i}" for i in range(40)])
    return sources.open_source(str(folder), "train", resolution=16)


@pytest.mark.parametrize("above", [False, True])
def test_a_collage_has_both_pictures_in_half_their_size_on_the_background(above):
    first, second = (np.full((16, 24, 3), value, np.uint8) for value in (10, 200))
    made = collages.collage(first, second, above, "black")
    want = np.zeros((16, 24, 3), np.uint8)
    if above:
        want[:8, 6:18], want[8:, 6:18] = 10, 200
    else:
        want[4:12, :12], want[4:12, 12:] = 10, 200
    np.testing.assert_array_equal(made, want)


def test_collages_are_added_and_named_by_both_captions(source):
    made = collages.added(source, 1.5, "train", seed=0)
    n = len(source)
    assert len(made) == n + round(1.5 * n)
    np.testing.assert_array_equal(made[3]["image"], source[3]["image"])
    layouts, captions = set(), set()
    for i in range(n, len(made)):
        example = made[i]
        first, second = example["caption"].split(" and ")
        above = bool((example["image"][0] != 255).any())
        for name, place in zip((first, second), collages.places(16, 16, above), strict=True):
            assert (example["image"][place][..., 0] == int(name.removeprefix("red "))).all()
        assert collages.split_of(first, second) == collages.split_of(second, first) == "train"
        layouts.add(above)
        captions.add(example["caption"])
        assert example["crop"].size == (16, 16)
    assert layouts == {False, True} and len(captions) > 0.9 * (len(made) - n)


def test_collages_follow_from_the_seed(source):
    made, again, other = (collages.added(source, 1, "train", seed) for seed in (0, 0, 1))
    captions = lambda source: [source[i]["caption"] for i in range(len(source))]
    assert captions(made) == captions(again) != captions(other)
    assert made.fingerprint == again.fingerprint
    prints = {source.fingerprint, made.fingerprint, other.fingerprint}
    prints |= {collages.added(source, *given).fingerprint for given in ((0.5, "train", 0), (1, "train", 0, "black"))}
    assert len(prints) == 5


def test_a_cache_and_pairs_that_are_all_held_out_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"data.collages = 0.5: .* has latents"):
        collages.added(dataclasses.replace(source, cache=tmp_path), 0.5, "train", seed=0)
    alone = next(name for name in map(str, range(999)) if collages.split_of(name, name) == "validation")
    same = dataclasses.replace(source, load=lambda i: {"caption": alone, "image": None})
    with pytest.raises(ValueError, match="none is of the train split: give more captions"):
        collages.added(same, 1, "train", seed=0)[len(same)]
