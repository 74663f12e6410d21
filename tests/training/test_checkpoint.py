"""Checkpoints on disks that fail, and which of them stay."""

import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxkd.machine import sharding
from flaxkd.training import checkpoint
from flaxkd.training.step import init_state


def state_of(step: int):
    params = {"unet": {"kernel": np.random.default_rng(step).standard_normal((300, 100)).astype(np.float32)}}
    return init_state(params, optax.adamw(1e-3), False)._replace(step=jnp.int32(step))


def restore(manager):
    like = jax.eval_shape(lambda: state_of(1))
    return checkpoint.restore(manager, like, sharding.params(sharding.make_mesh(-1, 1), like))


@pytest.fixture
def full_disk():
    """Called, it lets no file of this process grow beyond a few bytes: what a full disk does, by other means."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield lambda full: limit(1000 if full else before[0])
    limit(before[0])
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_fills_up_costs_one_checkpoint_and_says_so(tmp_path, full_disk):
    manager = checkpoint.manager(tmp_path, keep=3)
    checkpoint.save(manager, state_of(1), {"position": 1})
    checkpoint.wait(manager)
    full_disk(True)
    with pytest.raises(OSError, match=r"cannot be written to .*GiB free(.|\n)*whole one is that of step 1\. Make room"):
        checkpoint.save(manager, state_of(2), {"position": 2})
        checkpoint.wait(manager)
    full_disk(False)
    manager = checkpoint.manager(tmp_path, keep=3)  # as the same command does, when there is room again
    state, position = restore(manager)
    assert position == {"position": 1}
    np.testing.assert_array_equal(state.params["unet"]["kernel"], state_of(1).params["unet"]["kernel"])
    checkpoint.save(manager, state_of(2), {"position": 2})
    checkpoint.wait(manager)
    assert restore(checkpoint.manager(tmp_path, keep=3))[1] == {"position": 2}


def test_the_newest_are_kept_and_every_so_manieth_for_good(tmp_path):
    manager = checkpoint.manager(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        checkpoint.save(manager, state_of(step), {})
    checkpoint.wait(manager)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 10, 11]
