"""Checkpoints on disks that fail, and which of them stay."""

import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxkd import export
from flaxkd.machine import files, sharding
from flaxkd.training import checkpoint
from flaxkd.training.step import init_state
from tests.machine.test_files import ODD


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


@pytest.mark.parametrize("name", ODD)
def test_any_path_holds_checkpoints(tmp_path, name):
    workdir = tmp_path / name
    with checkpoint.claimed(workdir, {}):
        manager = checkpoint.manager(workdir, keep=2)
        for step in (1, 2):
            checkpoint.save(manager, state_of(step), {"position": step})
        checkpoint.wait(manager)
    assert restore(checkpoint.manager(workdir, keep=2))[1] == {"position": 2}
    step, params, averaged = export.restore(workdir / "checkpoints")
    np.testing.assert_array_equal(params["unet"]["kernel"], state_of(2).params["unet"]["kernel"])
    assert (step, averaged) == (2, False)
    assert sorted(path.name for path in workdir.iterdir()) == ["checkpoints", "config.json"]


def test_what_orbax_calls_finished_is_read(tmp_path, monkeypatch):
    """Orbax ends without an error if it finds none of its own files, as in a path that it takes for a pattern."""
    monkeypatch.setattr(files, "plain", lambda folder: folder)
    manager = checkpoint.manager(tmp_path / "br[ab]x", keep=2)
    with pytest.raises(OSError, match=r"cannot be written to .*br\[ab\]x/checkpoints"):
        checkpoint.save(manager, state_of(1), {})
        checkpoint.wait(manager)
    with pytest.raises(OSError, match=r"br\[ab\]y cannot hold a checkpoint: .*Give a --workdir"):
        with checkpoint.claimed(tmp_path / "br[ab]y", {}):
            pass
    assert list((tmp_path / "br[ab]y").iterdir()) == []


@pytest.mark.parametrize("where", ["params", "opt_state", "ema"])
def test_a_checkpoint_with_nan_is_not_taken(tmp_path, where, caplog):
    spoil = lambda tree: jax.tree.map(lambda x: x * np.nan if x.dtype == np.float32 else x, tree)
    manager = checkpoint.manager(tmp_path, keep=3)
    for step in (1, 2):
        state = state_of(step)._replace(ema=state_of(step).params)
        state = state._replace(**{where: spoil(getattr(state, where))}) if step == 2 else state
        checkpoint.save(manager, state, {"position": step})
    checkpoint.wait(manager)
    like = jax.eval_shape(lambda: state_of(1)._replace(ema=state_of(1).params))
    found = checkpoint.restore(manager, like, sharding.params(sharding.make_mesh(-1, 1), like))
    assert found[1] == {"position": 1} and manager.all_steps() == [1]
    assert where in caplog.text and "holds NaN or infinity" in caplog.text


def test_a_checkpoint_of_skipped_steps_is_none(tmp_path):
    state = state_of(1)
    assert checkpoint.is_good(state)
    assert not checkpoint.is_good(state._replace(health=state.health._replace(in_a_row=jnp.int32(1))))
