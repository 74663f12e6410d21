"""Weights in prompts and prompts in chunks, as user interfaces read them."""

import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd.diffusion import samplers, sampling
from flaxkd.drawing import emphasis
from flaxkd.pretrained import Folder
from tests import tiny
from tests.diffusion.stand_ins import LATENTS, LEADING, NEGATIVE, PARAMS, POSITIVE, STAND_INS, TABLE


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("red apple", [("red apple", 1)]),
        ("", []),
        ("a (red:1.5) apple", [("a ", 1), ("red", 1.5), (" apple", 1)]),
        ("(red) ((apple))", [("red", 1.1), (" ", 1), ("apple", 1.21)]),
        ("[red] apple", [("red", 1 / 1.1), (" apple", 1)]),
        ("(a (red:1.5) apple)", [("a ", 1.1), ("red", 1.65), (" apple", 1.1)]),
        (r"a \(red\) \[apple\]", [("a (red) [apple]", 1)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(red:-1)", [("red", -1)]),
        ("flag: Peru", [("flag: Peru", 1)]),
        ("(flag: Peru:1.2)", [("flag: Peru", 1.2)]),
        ("red (apple", [("red ", 1), ("apple", 1.1)]),
        ("red) apple]", [("red) apple]", 1)]),
        ("apple:1.2)", [("apple:1.2)", 1)]),
        ("(:1.2)", []),
        ("back\\slash", [("back\\slash", 1)]),
    ],
)
def test_parse(prompt, expected):
    found = emphasis.parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_a_short_prompt_without_brackets_is_what_it_was(tiny_pipeline):
    folder, prompts = Folder.open(tiny_pipeline), ["red apple", "", "grinning face"]
    for options in ((True, False), (False, True), (True, True)):
        found, weights = emphasis.encode(folder, prompts, emphasis=options[0], long_prompts=options[1])
        ids = found["input_ids"]
        np.testing.assert_array_equal(ids[:, 0], tiny.ids(folder, prompts))
        assert ids.shape == (3, 1, 16) and (weights == 1).all()


def test_a_long_prompt_is_chunks_of_all_its_words(tiny_pipeline):
    folder = Folder.open(tiny_pipeline)
    words = ["red", "apple", "green", "face"] * 5
    found, weights = emphasis.encode(folder, [" ".join(words), "red (apple:1.5)"], emphasis=True, long_prompts=True)
    ids = found["input_ids"]
    one = folder.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    room, bos, eos = 14, folder.tokenizer.bos_token_id, folder.tokenizer.eos_token_id
    assert ids.shape[1] == -(-len(one) // room) > 1
    kept = [token for chunk in ids[0] for token in chunk if token not in (bos, eos, folder.tokenizer.pad_token_id)]
    assert kept == one and (ids[0, :, 0] == bos).all() and ids[0, 0, -1] == eos
    red = len(folder.tokenizer("red", add_special_tokens=False)["input_ids"])
    apple = len(folder.tokenizer("apple", add_special_tokens=False)["input_ids"])
    expected = np.ones_like(weights[1])
    expected[0, 1 + red : 1 + red + apple] = 1.5
    np.testing.assert_array_equal(weights[1], expected)
    cut, _ = emphasis.encode(folder, [" ".join(words)], emphasis=True, long_prompts=False)
    np.testing.assert_array_equal(cut["input_ids"][0, 0], ids[0, 0])


def test_weights_move_states_away_from_those_of_nothing():
    """Without weights nothing changes; with them, the UNet sees (state - empty) * weight + empty, chunk after chunk."""
    latents = LATENTS[:, :2]  # a shape of their own: another test counts traces
    schedule, empty = samplers.schedule("ddim", LEADING, 2), {"input_ids": np.array([[7, 8, 9]], np.int32)}
    chunks = [{"input_ids": said["input_ids"][:, None]} for said in (POSITIVE, NEGATIVE)]
    draw = lambda weights: sampling.text_to_image(
        *STAND_INS, PARAMS, *chunks, latents, schedule, 3.0, token_weights=weights, empty_inputs=empty
    )
    plain = sampling.text_to_image(*STAND_INS, PARAMS, POSITIVE, NEGATIVE, latents, schedule, 3.0)
    ones = np.ones((2, 1, 3), np.float32)
    same = draw((ones, ones))
    np.testing.assert_allclose(same, plain, atol=1e-6)
    weights = np.array([[[1, 2, 1]], [[1, 1, 0]]], np.float32)
    positive, negative, nothing = (TABLE[said["input_ids"]] for said in (POSITIVE, NEGATIVE, empty))
    states = (positive - nothing) * weights[:, 0, :, None] + nothing
    condition = lambda modules, params, inputs: {
        "encoder_hidden_states": jnp.stack([negative, states], 1).reshape(4, 3, 4)
    }
    expected = sampling.text_to_image(STAND_INS[0], condition, PARAMS, POSITIVE, NEGATIVE, latents, schedule, 3.0)
    found = draw((ones, weights))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - plain).max() > 1e-3
