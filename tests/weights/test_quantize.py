"""Quantized networks: exactly the layers that should be, by qwix's arithmetic, whichever network was traced first."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
from flax import linen as nn

from configs import small
from flaxkd import pretrained, students, tasks
from flaxkd.models.layers import FEATURES
from flaxkd.pretrained import Folder
from flaxkd.weights import quantize
from flaxkd.weights.quantize import FULL, Quantization
from tests.running import write_plain


class Product(nn.Module):
    """A linear layer by a jitted function, whose trace JAX keeps."""

    features: int

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], self.features))


class Small(nn.Module):
    """Layers as in a UNet: a linear one of two tiles, one of none, a convolution, and one in full precision."""

    attend: Callable = lambda x: x

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, use_bias=False, name="to_q")(x)
        x = nn.Conv(64, (3, 3), use_bias=False, name="conv1")(self.attend(x))
        x = Product(8, name="to_out")(x)
        return nn.Conv(8, (1, 1), use_bias=False, name="conv_out")(x)


SMALL = Quantization("w8", full=("conv_out",))


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(Small().init, jax.random.key(0), jnp.zeros((1, 4, 4, 5)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def images(channels=5):
    return np.random.default_rng(1).standard_normal((2, 4, 4, channels), np.float32)


def rounded(kernel, scheme, tile=None):
    """By the published formulas: absmax / (qmax + 1/2); of float8, absmax / 448."""
    flat = kernel.reshape(-1, kernel.shape[-1]) if tile is None else kernel.reshape(-1, tile, kernel.shape[-1])
    largest = np.abs(flat).max(-2, keepdims=True) * np.float32({"w4": 0.85}.get(scheme, 0.999))
    if scheme == "fp8":
        scale = largest / np.float32(448)
        small = (flat / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        return (small.astype(np.float32) * scale).reshape(kernel.shape)
    q = {"w8": 127, "w8a8": 127, "w4": 7}[scheme]
    scale = largest / np.float32(q + 0.5)
    return (np.clip(np.round(flat / scale), -q - 1, q) * scale).reshape(kernel.shape)


@pytest.mark.parametrize("scheme", quantize.SCHEMES)
def test_weights_on_the_grid_are_what_the_formulas_say(params, scheme):
    found = quantize.on_grid(params, SMALL._replace(scheme=scheme))
    tile = 32 if scheme == "w4" else None
    expected = {"to_q": None, "conv1": None, "to_out": tile}
    assert quantize.layers(params, SMALL._replace(scheme=scheme)) == {(name,): t for name, t in expected.items()}
    for name, tile in expected.items():
        kernel = params[name]["kernel"]
        same = np.isclose(found[name]["kernel"], rounded(kernel, scheme, tile), rtol=1e-6)
        assert same.mean() > 0.999, name  # a number halfway between two may be either
        assert not np.array_equal(found[name]["kernel"], kernel)
    np.testing.assert_array_equal(found["conv_out"]["kernel"], params["conv_out"]["kernel"])
    half = quantize.on_grid(jax.tree.map(lambda x: x.astype(np.float16), params), SMALL)
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype("float16")}
    np.testing.assert_allclose(half["conv1"]["kernel"], rounded(params["conv1"]["kernel"], "w8"), atol=0.04)


@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_a_network_computes_with_weights_on_the_grid_and_gradients_pass_straight_through(params, scheme):
    how = SMALL._replace(scheme=scheme)
    said = lambda net, params: net.apply({"params": params}, images())
    network = quantize.wrapped(Small(), params, how)
    on_grid = quantize.on_grid(params, how)
    np.testing.assert_allclose(jax.jit(said, static_argnums=0)(network, params), said(Small(), on_grid), atol=1e-3)
    sums = lambda net: jax.grad(lambda p: said(net, p).sum())
    gradients = sums(network)(params), sums(Small())(on_grid)
    assert all(np.abs(x).min() > 0 for x in jax.tree.leaves(gradients[0]["to_q"]))
    np.testing.assert_allclose(gradients[0]["conv_out"]["kernel"], gradients[1]["conv_out"]["kernel"], rtol=1e-3)


@pytest.mark.parametrize(("scheme", "most"), [("w8a8", 0.02), ("fp8", 0.1)])
def test_rounded_activations_and_their_gradients_are_near(params, scheme, most):
    loss = lambda net: jax.value_and_grad(lambda p: jnp.square(net.apply({"params": p}, images())).sum())
    network = quantize.wrapped(Small(), params, SMALL._replace(scheme=scheme))
    for a, b in zip(*(jax.tree.leaves(loss(net)(params)) for net in (network, Small())), strict=True):
        assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(b) < most


def test_activations_of_one_sign_use_all_integers(params, monkeypatch):
    scheme, x = quantize.SCHEMES["w8a8"], np.abs(images())
    weights = quantize.on_grid(params, SMALL)
    errors = {}
    for calibration in ("minmax", "absmax"):
        monkeypatch.setitem(quantize.SCHEMES, "w8a8", scheme._replace(calibration=calibration))
        how = SMALL._replace(scheme="w8a8", full=("conv1", "to_out", "conv_out"))
        said = jax.jit(quantize.wrapped(Small(), params, how).apply)({"params": params}, x)
        exact = Small().apply({"params": params | {"to_q": weights["to_q"]}}, x)
        errors[calibration] = np.linalg.norm(said - exact)
    assert scheme.calibration == "minmax" and 0 < errors["minmax"] < 0.6 * errors["absmax"]


def test_where_the_weights_are_on_the_grid_nothing_is_rounded_again(params):
    """Twice would be wrong: the largest number of a scale is 7 of 7.5, and would make a new scale."""
    assert quantize.wrapped(Small(), params, SMALL._replace(on_grid=True)) == Small()
    assert quantize.wrapped(Small(), params, None) == Small()


def test_sizes(params):
    numbers = {name: x["kernel"].size for name, x in params.items()}
    assert numbers == {"to_q": 60, "conv1": 3 * 3 * 12 * 64, "to_out": 512, "conv_out": 64}
    assert quantize.size(params, None) == 2 * sum(numbers.values())
    assert quantize.size(params, SMALL) == 60 + 6912 + 512 + 2 * 64 + 2 * (12 + 64 + 8)
    assert quantize.size(params, SMALL._replace(scheme="w4")) == 30 + 3456 + 256 + 2 * 64 + 2 * (12 + 64 + 2 * 8)


def test_a_name_of_no_layer_is_refused_and_so_is_another_version(params):
    with pytest.raises(ValueError, match=r"full_precision: 'conv_inn' names no layer of this UNet.*such as to_out"):
        quantize.layers(params, SMALL._replace(full=("conv_out", "conv_inn")))
    assert Quantization.read({"scheme": "w4", "full": ["to_q"]}, "file") == Quantization("w4", ("to_q",))
    assert Quantization.read(SMALL._asdict(), "file") == SMALL and Quantization.read({}, "file") is None
    for content, message in [
        ({"scheme": "w3"}, "file: the quantization 'w3' is unknown .known: w8, w8a8, w4, fp8.: update flaxkd"),
        ({"bits": 4}, "file: {'bits': 4} does not say how"),
        (True, "file: True does not say how"),
    ]:
        with pytest.raises(ValueError, match=message):
            Quantization.read(content, "file")


# -- UNets ------------------------------------------------------------------------------------------------------------


def config(teacher, **changes):
    c = small.get_config()
    c.teacher, c.student, c.data.resolution = str(teacher), "sd_tiny", 32
    c.update_from_flattened_dict(changes)
    return c


def program(teacher, gradient=False, **changes) -> str:
    """That of the losses of a new task, in a new trace."""
    task = tasks.make(config(teacher, **changes), Folder.open(teacher), jnp.float32)
    inputs = task.prepare(jax.random.key(0), task.random_batch(2, 0))
    step = jax.value_and_grad(task.loss, has_aux=True) if gradient else task.loss
    return jax.jit(step).lower(task.trained, task.frozen, {}, inputs).as_text()


def products(text: str) -> int:
    """Of numbers of `fp8` on both sides: one a layer, where w8a8 has another for the zero point."""
    small = r"tensor<\S*xf8E4M3FN>"
    return len(re.findall(rf"stablehlo\.(?:dot_general|convolution).*\({small}, {small}\)", text))


@pytest.mark.parametrize("first", ["plain", "quantized"])
def test_no_network_computes_what_another_one_was_traced_for(params, first):
    jax.clear_caches()
    network = quantize.wrapped(Small(), params, SMALL._replace(scheme="fp8"))
    order = {"plain": Small(), "quantized": network, "again": Small()}
    order = order if first == "plain" else dict([*order.items()][1:])
    count = lambda net: products(jax.jit(lambda p: net.apply({"params": p}, images())).lower(params).as_text())
    assert {name: count(net) for name, net in order.items()} == dict.fromkeys(order, 0) | {"quantized": 3}


def test_off_the_program_of_a_step_is_the_same_before_and_after_a_quantized_one(tmp_path):
    jax.clear_caches()
    teacher, few = write_plain(tmp_path)["teacher"], {"task": "few_step", "student": None}
    plain = program(teacher, **few)
    count = len(quantize.layers(Folder.open(teacher).shapes("unet"), Quantization("fp8")))
    assert products(program(teacher, quantize="fp8", **few)) == 2 * count == 2 * 20  # at two timesteps
    assert products(plain) == 0 and program(teacher, **few) == plain


def test_of_a_student_each_layer_is_quantized_once(tiny_pipeline):
    """With remat, the backward pass has the products again that a gradient needs."""
    unet_config = students.config(students.get("sd_tiny"), Folder.open(tiny_pipeline).config("unet"))
    shapes = pretrained.shapes("unet", unet_config)
    count = len(quantize.layers(shapes, Quantization("fp8")))
    kept = sum("kernel" in str(path[-1]) for path, _ in jax.tree.leaves_with_path(shapes)) - count
    assert (count, kept) == (65, 4 + 9)
    assert products(program(tiny_pipeline, quantize="fp8")) == 65
    assert 65 < products(program(tiny_pipeline, gradient=True, quantize="fp8", remat=True)) <= 2 * 65


def test_every_rule_is_used_and_attention_is_left_alone(tiny_pipeline):
    folder = Folder.open(tiny_pipeline)
    unet, params = folder.load("unet")
    provider, unet = quantize.prepared(unet, params, Quantization("w4"))
    inputs = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2, jnp.int32), jnp.zeros((2, 16, 16))
    said = lambda net: lambda p: net.apply({"params": p}, *inputs, mutable=[FEATURES])
    quantized = jax.eval_shape(said(qwix.quantize_model(unet, provider)), params)
    assert len(provider._rules) == 2 and not provider.get_unused_rules()
    plain = jax.eval_shape(said(folder.module("unet")), params)
    assert quantized == plain  # all features, by the same names
    matched = lambda path: any(re.fullmatch(rule.module_path, path) for rule in provider._rules)
    block = "up_blocks.1/attentions.0/transformer_blocks.0/attn1"
    assert matched(f"{block}/to_q") and matched(f"{block}/to_out.0") and not matched(block)
    assert not matched("conv_in") and not matched("time_embedding/linear_1")


def test_w8a8_sees_the_residual_stream_as_it_is(tiny_pipeline):
    folder = Folder.open(tiny_pipeline)
    provider, _ = quantize.prepared(folder.module("unet"), folder.shapes("unet"), Quantization("w8a8"))
    seen = {
        rule.act_qtype: {path.split("/")[-1].replace("\\", "") for path in rule.module_path.split("|")}
        for rule in provider._rules
    }
    assert seen[None] == {"conv_shortcut"} and {"conv1", "to_q"} < seen["int8"] and "conv_shortcut" not in seen["int8"]
    assert {rule.weight_qtype for rule in provider._rules} == {"int8"}


def test_what_is_kept_in_full_precision_is_found_in_every_family(tiny_pipeline, tiny_xl):
    for path in (tiny_pipeline, tiny_xl):
        shapes = Folder.open(path).shapes("unet")
        assert quantize.layers(shapes, Quantization("w4"))
    assert tuple(config(path).full_precision) == FULL
    with pytest.raises(ValueError, match="'nothing' names no layer"):
        program(tiny_pipeline, quantize="w4", full_precision=("nothing",))
