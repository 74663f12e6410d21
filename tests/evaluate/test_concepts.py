"""What pictures show, read off originals: perfect ones show all that was asked for, and others by chance."""

import numpy as np
import pytest

from flaxkd.data import collages, openmoji
from flaxkd.evaluate import concepts
from flaxkd.evaluate.concepts import Prompt

KEYS = ("object", "color", "both", "all")


@pytest.fixture(scope="module")
def prompts():
    """A third of those for the training captions of OpenMoji."""
    names = openmoji.short_names()
    captions = [openmoji.caption_of(file.stem, names) for file in openmoji.svg_files()]
    return concepts.prompts([caption for caption in captions if openmoji.split_of(caption) == "train"])[::3]


def original(color, name, tone=0):
    """A picture of an object, in any color if it is None."""
    known = concepts.originals()
    found = [i for i, concept in enumerate(known.concepts) if concept[1] == name and color in (None, concept[0])]
    return known.pictures[found[tone]]


def two(first, second, above):
    """Two pictures in one, side by side or one above the other."""
    if not above:
        return collages.collage(first, second)
    halves = [collages.half(image, 64, 64) for image in (first, second)]
    return np.pad(np.concatenate(halves), ((0, 0), (16, 16), (0, 0)), constant_values=255)


def picture(wanted, above, noise):
    drawn = [original(*concept) for concept in wanted]
    drawn = drawn[0] if len(drawn) == 1 else two(*drawn, above)
    return (drawn + noise.normal(0, 50, drawn.shape)).clip(0, 255).astype(np.uint8)


def test_perfect_pictures_show_everything_and_shuffled_ones_what_chance_gives(prompts):
    noise = np.random.default_rng(0)
    shown = concepts.found(
        np.stack([picture(p.wanted, above=i % 2 == 1, noise=noise) for i, p in enumerate(prompts)]),
        concepts.originals(),
    )
    rows = concepts.shares(prompts, shown)
    assert [row["kind"] for row in rows] == ["seen", "novel", "two"] and all(row["pictures"] > 9 for row in rows)
    for row in rows:
        assert [row[key] for key in KEYS] == [1, 1, 1, 1]
        assert row["chance"]["both"] < 0.25 and row["chance"]["all"] < 0.15
    order = noise.permutation(len(prompts))
    shuffled = concepts.shares(prompts, [shown[i] for i in order])
    assert all(row["all"] < 0.3 and row["both"] < 0.4 and row["object"] < 0.7 for row in shuffled)


def test_a_wrong_color_costs_the_color_and_colors_in_each_others_place_cost_both():
    wanted = [("red", "heart"), ("blue", "square")]
    drawn = [
        original("blue", "heart"),
        two(original("blue", "heart"), original("red", "square"), above=False),
        original("red", "heart"),
        np.full((64, 64, 3), 255, np.uint8),
    ]
    shown = concepts.found(np.stack(drawn), concepts.originals())
    scores = [list(concepts.score(wanted, each).values()) for each in shown]
    assert shown[:3] == [(("blue", "heart"),), (("blue", "heart"), ("red", "square")), (("red", "heart"),)]
    assert scores[:3] == [[0.5, 0.5, 0, 0], [1, 1, 0, 0], [0.5, 0.5, 0.5, 0]]  # of KEYS


@pytest.mark.parametrize("above", [False, True])
def test_half_pictures_are_found_wherever_they_are_in_their_half(above):
    drawn = two(original("green", "circle", 1), original("pink", "hexagon", 1), above)
    moved = np.roll(drawn, (0, 12) if above else (12, 0), (0, 1))
    assert concepts.found(moved[None], concepts.originals()) == [(("green", "circle"), ("pink", "hexagon"))]


def test_prompts_say_what_training_captions_do_and_do_not(prompts):
    captions = ["red heart", "blue square", "star", "a green apple", "jar of blue paint"]
    found = {prompt.text: prompt.kind for prompt in concepts.prompts(captions)}
    assert found["red heart"] == found["blue square"] == "seen"
    assert found["red apple"] == found["red jar"] == "novel"
    assert "green apple" not in found and "blue jar" not in found  # neither a caption nor new
    assert all(collages.split_of(*p.text.split(" and ")) == "validation" for p in prompts if p.kind == "two")
    assert any(None in concept for p in prompts for concept in p.wanted)


def test_chance_is_that_of_the_same_pictures_in_any_order():
    prompts = [Prompt("seen", "red heart", (("red", "heart"),)), Prompt("seen", "red star", (("red", "star"),))]
    (row,) = concepts.shares(prompts, [(("red", "heart"),), (("red", "heart"),)])
    assert [row[key] for key in KEYS] == [0.5, 1, 0.5, 0.5] == [row["chance"][key] for key in KEYS]
