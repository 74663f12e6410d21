"""Attention on this machine's device: each form beside the plain one in float32, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd.machine import sharding
from flaxkd.models import attention
from tests.device import THERE, apart

pytestmark = pytest.mark.device

PLATFORM = attention.DotProductAttention(sharding.make_mesh(1, 1, [THERE])).platform
# Channels of a head, queries, keys: the levels of Stable Diffusion 1.x, 2.x and XL, and their text.
SHAPES = [(c, n, n) for n in (4096, 1024, 256, 64) for c in (40, 64, 80, 160)] + [(40, 4096, 77), (80, 1024, 77)]
BATCH, HEADS = (8, 8) if PLATFORM != "cpu" else (1, 2)


def forms(c: int, n: int, m: int) -> list[str]:
    """Those that may compute these shapes here: XLA's own, and the kernel if it is chosen."""
    chosen = attention.choose(PLATFORM, jnp.bfloat16, n, m, c)
    return [*dict.fromkeys(("plain", "blocked", chosen))]


@pytest.mark.parametrize(("c", "n", "m", "form"), [(*shape, form) for shape in SHAPES for form in forms(*shape)])
def test_a_form_is_plain_attention_in_value_and_gradient(c, n, m, form):
    rng = np.random.default_rng(0)
    query, key, value, dy = (
        jnp.asarray(rng.standard_normal((BATCH, tokens, HEADS, c), np.float32), jnp.bfloat16) for tokens in (n, m, m, n)
    )

    def both(form):
        def run(query, key, value, dy):
            y, backward = jax.vjp(attention.FORMS[form], query, key, value)
            return y, backward(dy)

        return jax.jit(run)

    with jax.default_matmul_precision("highest"):
        true = both("plain")(*(x.astype(jnp.float32) for x in (query, key, value, dy)))
    assert apart(*map(jax.device_get, (both(form)(query, key, value, dy), true))) < 2e-2
