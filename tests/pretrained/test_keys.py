"""One rule between two naming schemes, and what does not follow it."""

import numpy as np
import pytest

from flaxkd.pretrained import keys


def hollow(shape) -> np.ndarray:
    return np.broadcast_to(np.float32(0), tuple(shape))


def test_values_survive_and_axes_are_in_order():
    rng = np.random.default_rng(0)
    conv, linear, table = (rng.standard_normal(shape) for shape in [(5, 3, 2, 2), (5, 3), (7, 4)])
    path, kernel = keys.to_flax("down_blocks.0.resnets.1.conv1.weight", conv)
    assert path == ("down_blocks.0", "resnets.1", "conv1", "kernel")
    assert kernel[1, 0, 2, 4] == conv[4, 2, 1, 0]
    path, kernel = keys.to_flax("attn1.to_out.0.weight", linear)
    assert path == ("attn1", "to_out.0", "kernel") and kernel[2, 4] == linear[4, 2]
    path, kernel = keys.to_flax("text_model.embeddings.token_embedding.weight", table)
    assert path[-2:] == ("token_embedding", "embedding") and kernel[6, 3] == table[6, 3]
    # a module whose *parent* is called an embedding is an ordinary one
    assert keys.to_flax("time_embedding.linear_1.weight", linear)[0] == (
        "time_embedding",
        "linear_1",
        "kernel",
    )


def test_to_tensors_inverts_from_tensors_and_is_contiguous():
    rng = np.random.default_rng(0)
    tensors = {"conv_in.weight": rng.standard_normal((5, 3, 3, 3)), "conv_in.bias": rng.standard_normal(5)}
    tensors |= {"norm.weight": rng.standard_normal(5), "net.2.weight": rng.standard_normal((5, 7))}
    like = {"conv_in": {"kernel": hollow((3, 3, 3, 5)), "bias": hollow((5,))}}
    like |= {"norm": {"scale": hollow((5,))}, "net.2": {"kernel": hollow((7, 5))}}
    back = keys.to_tensors(keys.from_tensors(tensors, like, "toy"))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) and back[key].flags.c_contiguous for key in back)


def test_one_error_lists_missing_unexpected_and_misshaped():
    like = {"a": {"kernel": hollow((3, 5)), "bias": hollow((5,))}, "b.0": {"scale": hollow((4,))}}
    tensors = {"a.weight": hollow((5, 4)), "b.0.weight": hollow((4,)), "c.lora.weight": hollow((2, 2))}
    with pytest.raises(ValueError) as error:
        keys.from_tensors(tensors, like, "unet")
    text = str(error.value)
    assert "unet" in text
    assert "missing (1):\n    a.bias [5]" in text
    assert "unexpected (1):\n    c.lora.weight [2, 2]" in text
    assert "mis-shaped (1):\n    a.weight is [5, 4], must be [5, 3]" in text


def test_a_quantised_tensor_is_refused():
    like = {"a": {"kernel": hollow((3, 5)), "bias": hollow((5,))}}
    tensors = {"a.weight": np.zeros((5, 3), np.int8), "a.bias": np.zeros(5, np.float64)}
    with pytest.raises(ValueError, match=r"no floating point \(1\):\n    a.weight is int8"):
        keys.from_tensors(tensors, like, "unet")


def test_a_long_list_is_cut_with_its_number():
    like = {f"layers.{i}": {"bias": hollow((1,))} for i in range(100)}
    with pytest.raises(ValueError, match=r"missing \(100\)(.|\n)*and 80 more"):
        keys.from_tensors({}, like, "unet")


@pytest.mark.parametrize("as_convolution", [False, True])
def test_attention_names_of_old_autoencoders(as_convolution):
    rng = np.random.default_rng(0)
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    weights = {old: rng.standard_normal((4, 4)) for old in names}
    block = "encoder.mid_block.attentions.0"
    tensors = {f"{block}.{old}.weight": w[:, :, None, None] if as_convolution else w for old, w in weights.items()}
    like = {"encoder": {"mid_block": {"attentions.0": {new: {"kernel": hollow((4, 4))} for new in names.values()}}}}
    params = keys.from_tensors(tensors, like, "vae")["encoder"]["mid_block"]["attentions.0"]
    assert all(np.array_equal(params[new]["kernel"], weights[old].T) for old, new in names.items())


def test_both_names_for_one_tensor_are_an_error():
    like = {"attentions.0": {"to_q": {"bias": hollow((4,))}}}
    tensors = {"attentions.0.to_q.bias": hollow((4,)), "attentions.0.query.bias": hollow((4,))}
    with pytest.raises(ValueError, match=r"unexpected \(1\):\n    attentions.0.query.bias"):
        keys.from_tensors(tensors, like, "vae")


def test_text_encoder_with_and_without_prefix_and_with_its_buffer():
    like = {"text_model": {"final_layer_norm": {"scale": hollow((4,))}}}
    scale = np.arange(4.0)
    for prefix in ("", "text_model."):
        tensors = {
            f"{prefix}final_layer_norm.weight": scale,
            f"{prefix}embeddings.position_ids": np.arange(77)[None],
        }
        params = keys.from_tensors(tensors, like, "text_encoder")
        assert np.array_equal(params["text_model"]["final_layer_norm"]["scale"], scale)


@pytest.mark.parametrize("key, shape", [("alpha", (1,)), ("conv.weight", (2, 2, 2)), ("conv.running_mean", (2,))])
def test_what_is_no_weight_is_refused(key, shape):
    with pytest.raises(ValueError, match=key):
        keys.to_flax(key, hollow(shape))


# -- Names as people have them ---------------------------------------------------------------------------------------

LIKE = {"conv_in": {"kernel": hollow((1, 1, 2, 3))}, "mid_block": {"norm": {"scale": hollow((4,))}}}
NAMES = {"conv_in.weight": np.ones((3, 2, 1, 1)), "mid_block.norm.weight": np.arange(4.0)}
CLIP = {"text_model": {"encoder": {f"layers.{i}": {"fc1": {"bias": hollow((2,))}} for i in range(2)}}}


def prefixed(prefix: str, names: dict = NAMES) -> dict:
    return {prefix + key: array for key, array in names.items()}


@pytest.mark.parametrize(
    "tensors",
    [
        *map(prefixed, ("module.", "_orig_mod.", "model.", "model.diffusion_model.", "unet.", "student.net.", "ema.")),
        *map(prefixed, ("module._orig_mod.", "_orig_mod.module.", "model.module.diffusion_model.")),
        {key.replace(".", "._fsdp_wrapped_module.module.", 1): x for key, x in NAMES.items()},
        NAMES | prefixed("ema_model.", {key: 0 * x for key, x in NAMES.items()}),
        prefixed("model.") | prefixed("model_ema.", {key: 0 * x for key, x in NAMES.items()}),
    ],
    ids=lambda tensors: next(iter(tensors)),
)  # fmt: skip
def test_prefixes_of_wrappers_and_trainers(tensors):
    params = keys.from_tensors(tensors, LIKE, "unet")
    assert keys.to_tensors(params).keys() == NAMES.keys()
    np.testing.assert_array_equal(params["mid_block"]["norm"]["scale"], NAMES["mid_block.norm.weight"])


def test_two_copies_of_a_network_are_an_error():
    with pytest.raises(ValueError, match=r"unet holds its network twice, with the prefixes (student|teacher)\."):
        keys.from_tensors(prefixed("teacher.") | prefixed("student."), LIKE, "unet")


@pytest.mark.parametrize(
    "key",
    ["decay", "num_updates", "logit_scale", "alphas_cumprod", "loss.logvar", "loss.discriminator.main.0.weight",
     "model_ema.decay", "vision_model.encoder.layers.0.fc1.bias", "visual_projection.weight", "text_projection.weight",
     "text_model.embeddings.position_ids", "vae.encoder.conv_in.weight"],
)  # fmt: skip
def test_what_is_of_no_layer_is_left_out(key):
    for prefix in ("", "module."):
        params = keys.from_tensors(NAMES | {prefix + key: np.zeros(3)}, LIKE, "unet")
        assert keys.to_tensors(params).keys() == NAMES.keys()


@pytest.mark.parametrize(
    "key",
    ["mid_block.norm.lora_A.weight", "mid_block.attentions.0.to_q.weight", "down_blocks.3.norm.weight",
     "add_embedding.linear_1.weight", "lora.conv_in.down.weight", "conv_in.bias", "mid_block.to_k_ip.weight",
     "controlnet.conv_in.weight"],
)  # fmt: skip
def test_what_would_change_the_network_is_refused(key):
    for prefix in ("", "model."):
        with pytest.raises(ValueError, match=rf"unexpected \(1\):\n    {prefix}{key}"):
            keys.from_tensors(prefixed(prefix, NAMES | {key: np.zeros(3)}), LIKE, "unet")


@pytest.mark.parametrize(
    "prefix", ["text_model.", "", "module.text_model.", "cond_stage_model.transformer.text_model."]
)
def test_text_layers_above_the_last_one_are_left_out(prefix):
    tensors = {f"{prefix}encoder.layers.{i}.fc1.bias": np.full(2, i) * 1.0 for i in range(4)}
    params = keys.from_tensors(tensors, CLIP, "text_encoder")["text_model"]["encoder"]
    assert {name: layer["fc1"]["bias"][0] for name, layer in params.items()} == {"layers.0": 0, "layers.1": 1}
    with pytest.raises(ValueError, match=r"unexpected \(1\):\n    .*layers.1.fc3.bias"):
        keys.from_tensors(tensors | {f"{prefix}encoder.layers.1.fc3.bias": np.zeros(2)}, CLIP, "text_encoder")


def test_numbers_that_are_not_finite_name_their_tensor():
    for wrong in (np.nan, np.inf):
        params = keys.from_tensors(NAMES | {"mid_block.norm.weight": np.array([1, 2, wrong, 3])}, LIKE, "unet")
        with pytest.raises(
            ValueError, match=r"vae has numbers .*\. Remedy:\n  not finite \(1\):\n    mid_block.norm.weight"
        ):
            keys.check_finite(params, "vae", "Remedy")
