"""The forms of attention agree with each other, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd.machine import sharding
from flaxkd.models import attention
from flaxkd.models.attention import DotProductAttention, choose

FORMS = (attention.plain, attention.blocked)


def inputs(n: int, m: int, heads: int = 2, c: int = 8, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(2 * rng.standard_normal((3, length, heads, c)), dtype) for length in (n, m, m, n)]


def value_and_gradients(attention, query, key, value, dy):
    y, backward = jax.vjp(attention, query, key, value)
    return y, *backward(dy)


def test_long_attention_takes_one_head_at_a_time_on_a_cpu():
    attend = DotProductAttention(sharding.make_mesh(1, 1, jax.devices()[:1]))
    program = lambda n: jax.jit(attend).trace(*inputs(n, 1024)[:3]).lower().as_text()
    assert "stablehlo.while" in program(1024) and "stablehlo.while" not in program(512)


def test_without_devices_it_is_plain_wherever_it_is_lowered():
    """The platform is given, never asked for: a program has no part for another one."""
    arrays = inputs(512, 512)[:3]
    jaxpr = lambda attend: str(jax.make_jaxpr(attend)(*arrays))
    assert jaxpr(attention.dot_product_attention) == jaxpr(attention.plain)


def test_all_forms_in_half_precision():
    arrays = inputs(64, 64, dtype=jnp.bfloat16)
    forms = [value_and_gradients(form, *arrays) for form in FORMS]
    exact = value_and_gradients(attention.plain, *(x.astype(jnp.float32) for x in arrays))
    for *ours, true in zip(*forms, exact, strict=True):
        for x in ours:
            assert x.dtype == jnp.bfloat16
            assert jnp.abs(x - true).max() < 0.05 * jnp.abs(true).max()


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_the_kernel_of_tpus_is_plain_attention_in_value_and_gradient():
    arrays = inputs(256, 128)
    kernel = functools.partial(attention.splash, interpret=True)
    close(value_and_gradients(kernel, *arrays), value_and_gradients(attention.plain, *arrays))


class Elsewhere(DotProductAttention):
    """As if the mesh's devices were of another platform."""

    platform = "gpu"


def test_a_kernel_is_told_which_examples_a_device_holds(monkeypatch):
    """In the place of a kernel that cannot run here is one that can, which is plain attention as XLA has it."""
    seen = []

    def kernel(query, key, value):
        seen.append(query.shape)
        return jax.nn.dot_product_attention(query, key, value)

    monkeypatch.setitem(attention.FORMS, "cudnn", kernel)
    monkeypatch.setattr(attention, "LONG", 32 * 32)
    attend = Elsewhere(sharding.make_mesh(2, 2), "cudnn")
    arrays = [jnp.concatenate([x, x[:1]]) for x in inputs(32, 32)]
    ours = jax.jit(lambda *x: value_and_gradients(attend, *x))(*arrays)
    close(ours, value_and_gradients(attention.plain, *arrays))
    assert set(seen) == {(1, 32, 2, 8)}
    attend(*(x[:, :16] for x in arrays[:3]))  # too short for it
    assert set(seen) == {(1, 32, 2, 8)}


def test_heads_are_taken_one_at_a_time_on_each_device(monkeypatch):
    monkeypatch.setattr(attention, "LONG", 32 * 32)
    attend = DotProductAttention(sharding.make_mesh(2, 2))
    arrays = [jnp.concatenate([x, x[:1]]) for x in inputs(32, 32)]
    arrays = [jax.device_put(x, sharding.batch(attend.mesh)) for x in arrays]
    program = jax.jit(lambda *x: value_and_gradients(attend, *x)).lower(*arrays).compile()
    close(program(*arrays), value_and_gradients(attention.plain, *arrays))
    text = program.as_text()
    assert "while" in text and "all-gather" not in text and "all-reduce" not in text


def test_cudnn_gets_the_layout_and_the_factor_of_plain_attention(monkeypatch):
    xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, implementation: xla(*x))
    arrays = inputs(16, 16)
    close(value_and_gradients(attention.cudnn, *arrays), value_and_gradients(attention.plain, *arrays))


@pytest.mark.parametrize(
    ("platform", "dtype", "n", "m", "c", "form"),
    [  # the levels of Stable Diffusion 1.x at 512 pixels, and its text
        ("tpu", "bfloat16", 4096, 4096, 40, "splash"),
        ("tpu", "bfloat16", 1024, 1024, 80, "splash"),
        ("tpu", "bfloat16", 256, 256, 160, "plain"),
        ("tpu", "bfloat16", 4096, 77, 40, "plain"),
        ("tpu", "bfloat16", 60 * 60, 60 * 60, 40, "plain"),  # 480 pixels: no multiple of 128
        ("gpu", "bfloat16", 4096, 4096, 40, "cudnn"),
        ("gpu", "float32", 4096, 4096, 40, "plain"),
        ("gpu", "bfloat16", 2304, 2304, 160, "plain"),  # 1,536 pixels: heads too wide before Hopper
        ("cpu", "float32", 1024, 1024, 8, "blocked"),
        ("cpu", "float32", 256, 256, 8, "plain"),
    ],
)
def test_the_form_that_pays(platform, dtype, n, m, c, form):
    assert choose(platform, dtype, n, m, c) == form


def test_a_form_can_be_asked_for():
    arrays = inputs(512, 512)[:3]
    program = lambda form: jax.jit(DotProductAttention(form=form)).trace(*arrays).lower().as_text()
    assert "stablehlo.while" in program("blocked") and "stablehlo.while" not in program("plain")
    mesh = sharding.make_mesh(-1, 1)
    with pytest.raises(ValueError, match=r"unknown.*plain, blocked, splash, cudnn"):
        DotProductAttention(mesh, "flash")
    with pytest.raises(ValueError, match="'splash' is a kernel for tpu, and these devices are cpu"):
        DotProductAttention(mesh, "splash")


@pytest.mark.parametrize("form", ["plain", "blocked"])
def test_upcast_takes_the_products_in_float32(form):
    arrays = [8 * x.astype(jnp.bfloat16) for x in inputs(64, 64)[:3]]
    exact = attention.plain(*(x.astype(jnp.float32) for x in arrays))
    error = lambda upcast: float(jnp.abs(attention.FORMS[form](*arrays, upcast) - exact).max())
    assert error(True) < error(False)
