"""The forms of attention agree, in value and gradient, with each other and with PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd.models import layers


def inputs(n: int, m: int, heads: int = 2, c: int = 8, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(2 * rng.standard_normal((3, length, heads, c)), dtype) for length in (n, m, m, n)]


def value_and_gradients(attention, query, key, value, dy):
    y, backward = jax.vjp(attention, query, key, value)
    return y, *backward(dy)


@pytest.mark.parametrize(("n", "m"), [(512, 512), (1024, 256), (40, 7)])
def test_attention_is_that_of_torch(n, m):
    torch = pytest.importorskip("torch")
    arrays = inputs(n, m)
    ours = jax.jit(lambda *x: value_and_gradients(layers.dot_product_attention, *x))(*arrays)
    query, key, value, dy = (torch.from_numpy(np.array(x)).transpose(1, 2).requires_grad_() for x in arrays)
    y = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    y.backward(dy.detach())
    for a, b in zip(ours, (y, query.grad, key.grad, value.grad), strict=True):
        b = b.detach().transpose(1, 2).numpy()
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_long_attention_takes_one_head_at_a_time_on_a_cpu_alone():
    program = lambda n, platform: (
        jax.jit(layers.dot_product_attention)
        .trace(*inputs(n, 512)[:3])
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    assert "stablehlo.while" in program(512, "cpu")
    assert "stablehlo.while" not in program(256, "cpu") and "stablehlo.while" not in program(512, "tpu")


def test_both_forms_in_half_precision():
    arrays = [jnp.swapaxes(x, 1, 2) for x in inputs(64, 64, dtype=jnp.bfloat16)]
    forms = [value_and_gradients(form, *arrays) for form in (layers._attend, layers._head_by_head)]
    exact = value_and_gradients(layers._attend, *(x.astype(jnp.float32) for x in arrays))
    for a, b, true in zip(*forms, exact, strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        scale = jnp.abs(true).max()
        assert jnp.abs(a - true).max() < 0.05 * scale and jnp.abs(b - true).max() < 0.05 * scale
