"""Adapters: which modules they are for, how large they are, and what merging adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flaxkd import students
from flaxkd.pretrained import families, keys
from flaxkd.weights import lora

TEXT = families.shapes("text_encoder", families.CLIP_L)


def unet(student: str | None, teacher: dict = families.SD15) -> dict:
    return families.shapes("unet", students.config(students.get(student), teacher) if student else teacher)


def size(adapter: dict) -> int:
    return sum(np.prod(x.shape) for x in jax.tree.leaves(adapter))


@pytest.mark.parametrize(
    ("student", "targets", "rank", "modules", "parameters"),
    [
        # as peft counts them on diffusers' UNets
        (None, "attention", 4, 128, 797_184),
        (None, "feed_forward", 4, 192, 1_695_744),
        ("sd_small", "attention", 4, 80, 509_440),
        ("sd_small", "feed_forward", 4, 120, 1_085_440),
        ("bk_small", "attention", 4, 72, 431_616),
        ("bk_small", "feed_forward", 4, 108, 915_456),
        # "67.5 M" of latent-consistency/lcm-lora-sdv1-5
        (None, "lcm", 64, 278, 67_252_224),
        (None, "all", 1, 282, None),
    ],
)
def test_an_adapter_has_the_published_size(student, targets, rank, modules, parameters):
    shapes = unet(student)
    assert len(lora.modules(shapes, targets)) == modules
    if parameters:  # those of rank 1 are sampled sooner
        assert rank * size(lora.init(shapes, targets, 1, seed=0)) == parameters


def test_text_encoders_have_targets_of_the_same_names():
    assert len(lora.modules(TEXT, "attention")) == 12 * 4
    assert len(lora.modules(TEXT, "feed_forward")) == 12 * 6  # kohya's 72


def test_targets_are_ends_of_names_too():
    assert len(lora.modules(unet(None), ("to_q", "to_v"))) == 64  # Segmind's
    assert len(lora.modules(TEXT, ("q_proj", "v_proj"))) == 24
    assert {path[0] for path in lora.modules(unet(None), r"mid_block\..*to_k")} == {"mid_block"}
    with pytest.raises(ValueError, match=r"'q_proj' names no module of this part. Known are attention, .*up_blocks.1"):
        lora.modules(unet(None), ("to_q", "q_proj"))


SMALL = {
    "to_q": {"kernel": np.full((3, 2), 1.0, np.float32)},
    "conv1": {"kernel": np.zeros((3, 3, 3, 2), np.float32), "bias": np.ones(2, np.float32)},
}


def test_a_new_adapter_changes_nothing_and_depends_on_seed_and_name_alone():
    adapter = lora.init(SMALL, "all", 4, seed=0)
    merged = lora.merge(SMALL, adapter)
    jax.tree.map(np.testing.assert_array_equal, merged, SMALL)
    same = lora.init({"to_q": SMALL["to_q"]}, "all", 4, seed=0)
    np.testing.assert_array_equal(same["to_q"]["lora_A"]["kernel"], adapter["to_q"]["lora_A"]["kernel"])
    assert np.any(lora.init(SMALL, "all", 4, seed=1)["to_q"]["lora_A"]["kernel"] != same["to_q"]["lora_A"]["kernel"])


def test_a_is_gaussian_with_the_deviation_of_peft():
    a, _ = lora.layers(lora.init({"to_q": {"kernel": np.zeros((9000, 2))}}, "to_q", 8, seed=0))[("to_q",)]
    assert a.std() == pytest.approx(1 / 8, rel=0.02) and abs(a.mean()) < 2e-3 and a.dtype == np.float32


def test_merging_adds_the_scaled_product_over_the_last_axis():
    adapter = {
        "to_q": {
            "lora_A": {"kernel": np.float32([[1, 0], [0, 1], [1, 1]])},
            "lora_B": {"kernel": np.float32([[1, 2], [3, 4]])},
        }
    }
    merged = lora.merge(SMALL, adapter, scale=0.5)
    np.testing.assert_array_equal(merged["to_q"]["kernel"], [[1.5, 2], [2.5, 3], [3, 4]])
    assert merged["conv1"]["bias"] is SMALL["conv1"]["bias"]


def test_the_delta_of_a_convolution_is_that_of_two_convolutions_in_a_row():
    """A keeps stride and padding of the layer, B is 1 x 1: what peft computes without merging."""
    shapes = {"conv1": {"kernel": np.zeros((3, 3, 3, 5), np.float32)}}
    adapter = lora.init(shapes, "conv1", 2, seed=0)
    adapter["conv1"]["lora_B"]["kernel"] += np.float32([[[[1, -2, 3, 0.5, 2], [2, 1, 0, 1, -1]]]])
    [(a, b)] = lora.layers(adapter).values()
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 3), np.float32)
    convolve = lambda x, kernel, stride: jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    for stride in (1, 2):
        one, two = convolve(x, lora.delta(a, b), stride), convolve(convolve(x, a, stride), b, 1)
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_the_sum_is_made_in_float32_and_cast_after_it():
    base = {"to_q": {"kernel": jnp.full((1, 1), 1.0, jnp.float32)}}
    adapter = {"to_q": {"lora_A": {"kernel": np.float32([[1]])}, "lora_B": {"kernel": np.float32([[2**-9]])}}}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    assert lora.merge(base, adapter)["to_q"]["kernel"] == 1 + 2**-9  # below half a step of bfloat16 at 1
    assert lora.merge(half, adapter)["to_q"]["kernel"] == 1
    cast = lora.merge(base, adapter, scale=3, dtype=jnp.bfloat16)["to_q"]["kernel"]
    assert cast.dtype == jnp.bfloat16 and cast == 1 + 2**-7  # 1.00586 to the nearest


def test_an_adapter_of_another_network_is_refused_with_its_modules():
    adapter = lora.init(SMALL, "all", 2, seed=0)
    with pytest.raises(ValueError, match=r"2 modules.*\n  conv1: there is no.*\n  to_q: \(3, 2\) of the .*\(3, 7\)"):
        lora.merge({"to_q": {"kernel": np.zeros((3, 7))}}, adapter)


def test_the_layout_is_what_keys_make_of_the_names_of_peft():
    adapter = lora.init(SMALL, "all", 2, seed=0)
    for path, x in flatten_dict(adapter).items():
        key, array = keys.to_diffusers(path, x)
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
        again, back = keys.to_flax(key, array)
        assert again == path
        np.testing.assert_array_equal(back, x)
    shapes = {".".join(path): keys.to_diffusers(path, x)[1].shape for path, x in flatten_dict(adapter).items()}
    assert shapes["conv1.lora_A.kernel"] == (2, 3, 3, 3) and shapes["conv1.lora_B.kernel"] == (2, 2, 1, 1)
