"""A function is compiled once, and every device gets as many rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxkd.machine import sharding


def test_a_decorated_function_is_compiled_once_per_static_argument():
    traced = []

    @sharding.jit(static_argnames="power")
    def raised(x, power):
        """Of x."""
        traced.append(power)
        return x**power

    assert [float(raised(jnp.float32(3), power=n)) for n in (2, 2, 3)] == [9, 9, 27]
    assert traced == [2, 3] and raised.__doc__ == "Of x."


@pytest.mark.parametrize(("rows", "each", "found"), [(3, 1, [0, 1, 2, 0]), (9, 2, [*range(8)]), (4, 1, [0, 1, 2, 3])])
def test_every_device_gets_as_many_rows(rows, each, found):
    mesh = sharding.make_mesh(-1, 1, jax.devices()[:4])
    x = np.arange(2 * rows).reshape(rows, 2)
    np.testing.assert_array_equal(sharding.fill(x, each, mesh), x[found])
