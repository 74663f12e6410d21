"""The train step on a task of one matrix, where everything can be computed by hand; then on a UNet, sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from configs import default
from flaxkd.machine import sharding
from flaxkd.training.step import MEMORY, init_state, judge, learning_rate, make_step, optimizer
from flaxkd.training.task import Task


def config(**changes):
    c = default.get_config()
    c.batch_size = 8
    c.optimizer = dict(name="sgd")
    c.learning_rate = dict(schedule="constant_schedule", value=0.1)
    c.max_grad_norm = None
    for name, value in changes.items():  # not `update`, which would merge dicts
        setattr(c, name, value)
    return c


def mesh(devices=1, fsdp=1):
    return jax.make_mesh(
        (devices // fsdp, fsdp),
        ("data", "fsdp"),
        devices=jax.devices()[:devices],
        axis_types=(AxisType.Auto,) * 2,
    )


def linear_task():
    """Learns x @ w = y from noisy x: random numbers, a frozen matrix, and a gradient known in closed form."""
    rng = np.random.default_rng(0)
    params = {"unet": {"w": rng.standard_normal((4, 3)).astype(np.float32)}}
    frozen = {"teacher": rng.standard_normal((4, 3)).astype(np.float32)}

    def prepare(key, batch):
        return batch["x"] + jax.random.normal(key, batch["x"].shape)

    def loss(params, frozen, average, x):
        value = jnp.mean((x @ params["unet"]["w"] - x @ frozen["teacher"]) ** 2)
        return value, {"loss": value}

    return Task({"x": jax.ShapeDtypeStruct((4,), jnp.float32)}, params, frozen, prepare, loss)


def train(task, c, steps=1, on=None):
    on = on or mesh()
    tx = optimizer(c)
    state = init_state(jax.tree.map(jnp.array, task.trained), tx, bool(c.ema_decay))
    state = jax.device_put(state, sharding.params(on, state))
    step, _ = make_step(task, c, tx, on, state)
    x = np.random.default_rng(1).standard_normal((c.batch_size, 4)).astype(np.float32)
    history = []
    for _ in range(steps):
        batch = {"x": jax.device_put(x, sharding.batch(on))}
        state, metrics = step(state, task.frozen, batch, jax.random.key(c.seed))
        history.append(jax.device_get((state.params, metrics)))
    return state, history


def test_one_step_of_gradient_descent():
    task = linear_task()
    state, [(params, metrics)] = train(task, config())
    key = jax.random.fold_in(jax.random.key(0), 0)
    x = np.asarray(task.prepare(key, {"x": np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)}))
    w, teacher = task.trained["unet"]["w"], task.frozen["teacher"]
    gradient = 2 * x.T @ (x @ w - x @ teacher) / (8 * 3)
    np.testing.assert_allclose(params["unet"]["w"], w - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 0.1)
    assert int(state.step) == 1


def test_another_seed_is_not_another_program():
    programs = []
    for seed in (0, 1):
        task, c = linear_task(), config(seed=seed)
        tx = optimizer(c)
        state = jax.eval_shape(lambda params, tx=tx: init_state(params, tx, False), task.trained)
        step, _ = make_step(task, c, tx, mesh(), state)
        batch = {"x": jax.ShapeDtypeStruct((c.batch_size, 4), np.float32)}
        programs.append(step.lower(state, task.frozen, batch, jax.random.key(seed)).as_text())
    assert programs[0] == programs[1]


def test_randomness_follows_seed_and_step():
    still = dict(schedule="constant_schedule", value=0.0)

    def losses(seed):
        return [float(m["loss"]) for _, m in train(linear_task(), config(seed=seed, learning_rate=still), 3)[1]]

    assert losses(0) == losses(0)
    assert len(set(losses(0)) | set(losses(1))) == 6


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # the square of the last is no float32
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(accumulate, bad):
    falling = dict(schedule="linear_schedule", init_value=0.1, end_value=0.0, transition_steps=10)
    task = linear_task()
    c = config(accumulate=accumulate, ema_decay=0.9, optimizer=dict(name="adamw"), learning_rate=falling)
    tx = optimizer(c)
    state = init_state(task.trained, tx, True)
    step, _ = make_step(task, c, tx, mesh(), state)
    x = np.random.default_rng(1).standard_normal((c.batch_size, 4)).astype(np.float32)
    poisoned = x.copy()
    poisoned[-1, 0] = bad
    history, skipped, rates = [jax.device_get(state)], [], []
    for batch in (x, poisoned, poisoned, x):
        state, metrics = step(state, task.frozen, {"x": batch}, jax.random.key(0))
        history.append(jax.device_get(state))
        skipped.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
        rates.append(float(metrics["learning_rate"]))
    assert skipped == [(0, 0), (1, 1), (2, 2), (2, 0)]
    assert rates == pytest.approx([0.1, 0.09, 0.09, 0.09])  # as the optimizer counts, whose state stays
    same = lambda a, b: all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
    _, one, two, three, four = (s._replace(step=0, health=0) for s in history)
    assert same(one, two) and same(two, three) and not same(three, four)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(four))
    assert int(state.step) == 4 and int(state.health.good) == 2


def test_a_loss_far_above_the_usual_is_a_bad_step():
    health = init_state({}, optax.identity(), False).health
    for i in range(MEMORY):  # at first, nothing is usual
        good, health = judge(health, jnp.float32(100.0 if i == 0 else 1.0), jnp.float32(1.0), 20.0)
        assert good
    assert float(health.usual) == pytest.approx((100 + MEMORY - 1) / MEMORY, rel=1e-5)
    taken = lambda loss, spike: bool(judge(health, jnp.float32(loss), jnp.float32(1.0), spike)[0])
    assert taken(39.0, 20.0) and not taken(41.0, 20.0) and taken(41.0, None)
    assert not taken(np.nan, None) and not taken(np.nan, 20.0)
    assert not judge(health, jnp.float32(1.0), jnp.float32(np.inf), None)[0]
    _, after = judge(health, jnp.float32(41.0), jnp.float32(1.0), 20.0)
    assert after.usual == health.usual and (int(after.skipped), int(after.in_a_row)) == (1, 1)
    _, later = judge(after, jnp.float32(0.99), jnp.float32(1.0), 20.0)
    assert float(later.usual) == pytest.approx(1.98, rel=1e-5) and int(later.in_a_row) == 0


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_equals_the_whole_batch(accumulate):
    whole = train(linear_task(), config(), 3)[1]
    parts = train(linear_task(), config(accumulate=accumulate), 3)[1]
    for (a, m), (b, n) in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a["unet"]["w"], b["unet"]["w"], rtol=1e-5)
        np.testing.assert_allclose(m["loss"], n["loss"], rtol=1e-5)


def test_validation_holds_no_more_examples_at_a_time_than_a_step():
    sizes, task = [], linear_task()

    def loss(params, frozen, average, x):
        sizes.append(len(x))
        return task.loss(params, frozen, average, x)

    x = np.random.default_rng(1).standard_normal((24, 4)).astype(np.float32)
    whole = task.loss(task.trained, task.frozen, {}, task.prepare(jax.random.key(0), {"x": x}))[0]
    for on, accumulate, most in [(mesh(), 1, 8), (mesh(), 2, 4), (mesh(4), 1, 8), (mesh(2), 3, 2)]:
        c = config(accumulate=accumulate, batch_size=8 if accumulate < 3 else 6)
        state = jax.eval_shape(lambda c=c: init_state(task.trained, optimizer(c), False))
        evaluate = make_step(dataclasses.replace(task, loss=loss), c, optimizer(c), on, state)[1]
        del sizes[:]
        np.testing.assert_allclose(evaluate(task.trained, task.frozen, {}, {"x": x})["loss"], whole, rtol=1e-6)
        assert set(sizes) == {most}


@pytest.mark.parametrize("examples", [1, 3, 10, 13])
def test_validation_is_that_of_exactly_its_examples_on_any_number_of_devices(examples):
    task, c = linear_task(), config()
    x = np.random.default_rng(1).standard_normal((examples, 4)).astype(np.float32)
    whole = task.loss(task.trained, task.frozen, {}, task.prepare(jax.random.key(0), {"x": x}))[0]
    for devices in (1, 2, 4):
        on = mesh(devices)
        state = jax.eval_shape(lambda: init_state(task.trained, optimizer(c), False))
        evaluate = make_step(task, c, optimizer(c), on, state)[1]
        batch = sharding.put({"x": x}, sharding.replicated(on))
        np.testing.assert_allclose(evaluate(task.trained, task.frozen, {}, batch)["loss"], whole, rtol=1e-6)


def test_clipping_bounds_the_update():
    task = linear_task()
    params = train(task, config(max_grad_norm=0.01))[1][0][0]
    np.testing.assert_allclose(np.linalg.norm(params["unet"]["w"] - task.trained["unet"]["w"]), 0.1 * 0.01, rtol=1e-4)


def test_ema_follows_with_a_warm_up():
    task = linear_task()
    state, history = train(task, config(ema_decay=0.5), 12)
    expected = task.trained["unet"]["w"]
    for i, (params, _) in enumerate(history):
        decay = min(0.5, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * params["unet"]["w"]
    np.testing.assert_allclose(state.ema["unet"]["w"], expected, rtol=1e-5)
    assert train(task, config())[0].ema == {}


def test_any_optax_schedule_and_optimizer():
    c = config(learning_rate=dict(schedule="cosine_decay_schedule", init_value=1.0, decay_steps=4))
    rates = [m["learning_rate"] for _, m in train(linear_task(), c, 3)[1]]
    np.testing.assert_allclose(rates, [optax.cosine_decay_schedule(1.0, 4)(i) for i in range(3)], rtol=1e-6)
    train(linear_task(), config(optimizer=dict(name="adafactor")))
    with pytest.raises(ValueError, match=r"learning_rate.schedule = 'cosine' is not in optax.schedules .*cosine_decay"):
        learning_rate(config(learning_rate=dict(schedule="cosine")))
    with pytest.raises(ValueError, match="decay_step"):
        learning_rate(config(learning_rate=dict(schedule="cosine_decay_schedule", init_value=1.0, decay_step=4)))
    with pytest.raises(ValueError, match=r"optimizer\.name = 'adamx' is not in optax"):
        optimizer(config(optimizer=dict(name="adamx")))


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_four_devices_equal_one(fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    c = config(
        optimizer=dict(name="adamw"),
        ema_decay=0.9,
        learning_rate=dict(schedule="constant_schedule", value=0.01),
    )
    one, four = train(linear_task(), c, 4)[1], train(linear_task(), c, 4, mesh(4, fsdp))
    if fsdp > 1:
        assert not four[0].params["unet"]["w"].sharding.is_fully_replicated
        assert not four[0].opt_state[1][0].mu["unet"]["w"].sharding.is_fully_replicated
    for (a, m), (b, n) in zip(one, four[1], strict=True):
        np.testing.assert_allclose(a["unet"]["w"], b["unet"]["w"], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(m["loss"], n["loss"], rtol=1e-5)


def test_mesh_and_batch_errors_say_the_numbers():
    with pytest.raises(ValueError, match="data=3 x fsdp=2 does not fit 4 devices"):
        sharding.make_mesh(3, 2)
    with pytest.raises(ValueError, match=r"batch_size = 6 images .* 4 devices x 1 .* multiple of 4"):
        sharding.check_batch(mesh(4), 6, 1)


def test_the_large_axis_is_sharded_and_small_tensors_are_not():
    shapes = {
        "kernel": jax.ShapeDtypeStruct((3, 3, 512, 1024), jnp.float32),
        "odd": jax.ShapeDtypeStruct((1025, 1025), jnp.float32),
    }
    shapes["bias"] = jax.ShapeDtypeStruct((1024,), jnp.float32)
    specs = jax.tree.map(lambda s: tuple(s.spec), sharding.params(mesh(4, 2), shapes))
    assert specs == {"kernel": (None, None, None, "fsdp"), "odd": (), "bias": ()}
