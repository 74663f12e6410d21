"""The forms of attention equal PyTorch's, in value and gradient."""

import jax
import numpy as np
import pytest

from flaxkd.machine import sharding
from flaxkd.models.attention import DotProductAttention
from tests.models.test_attention import inputs, value_and_gradients

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("n", "m"), [(1024, 1024), (1089, 1030), (128, 130), (40, 7)]
)  # blocked, and in blocks of 121; plain
def test_attention_is_that_of_torch(n, m):
    arrays, on_a_cpu = inputs(n, m), DotProductAttention(sharding.make_mesh(1, 1, jax.devices()[:1]))
    ours = jax.jit(lambda *x: value_and_gradients(on_a_cpu, *x))(*arrays)
    query, key, value, dy = (torch.from_numpy(np.array(x)).transpose(1, 2).requires_grad_() for x in arrays)
    y = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    y.backward(dy.detach())
    for a, b in zip(ours, (y, query.grad, key.grad, value.grad), strict=True):
        b = b.detach().transpose(1, 2).numpy()
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
