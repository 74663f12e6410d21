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


@pytest.mark.parametrize(("rows", "devices", "found"), [(3, 4, 12), (9, 2, 18), (4, 4, 4), (8, 4, 8), (6, 4, 12)])
def test_every_device_gets_as_many_rows_and_every_row_counts_alike(rows, devices, found):
    mesh = sharding.make_mesh(-1, 1, jax.devices()[:devices])
    x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
    repeated = jax.jit(lambda x: sharding.repeated(x, mesh))(sharding.put(x, sharding.replicated(mesh)))
    assert repeated.sharding.shard_shape(repeated.shape) == (found // devices, 2)
    np.testing.assert_array_equal(repeated, np.resize(x, (found, 2)))
    np.testing.assert_array_equal(np.unique(repeated[:, 0], return_counts=True)[1], found // rows)
