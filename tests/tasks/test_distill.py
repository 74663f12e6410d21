"""The distillation step on real networks: sharded like unsharded, the teacher untouched; and drawing like diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from configs import default
from flaxkd import tasks
from flaxkd.machine import sharding
from flaxkd.pretrained import Folder
from flaxkd.tasks import inputs
from flaxkd.training.step import init_state, make_step, optimizer
from tests.running import write_plain

# (devices, fsdp). A UNet takes a minute for each to compile. The suite has one mesh, and compares meshes on the small
# networks of training/test_step.py and machine/test_hosts.py; FLAXKD_TEST_DEVICES=8 compares all of 8 devices here.
MESHES = [(4, 2)] if jax.device_count() < 8 else [(8, 1), (8, 2), (8, 4), (8, 8)]


def config(**changes):
    c = default.get_config()
    c.batch_size = 8
    c.student = "sd_tiny"
    c.weight = dict(noise=1.0, output=0.5, feature=0.5)
    c.learning_rate = dict(schedule="constant_schedule", value=1e-3)
    c.caption_dropout = 0.5
    c.snr_gamma = 5.0
    c.ema_decay = 0.9
    for name, value in changes.items():
        setattr(c, name, value)
    return c


def batch():
    rng = np.random.default_rng(0)
    moments = rng.standard_normal((8, 8, 8, 8)).astype(np.float32)
    return {"moments": moments, "input_ids": rng.integers(0, 300, (8, 16), np.int32)}


@pytest.fixture(scope="module")
def run(tiny_pipeline):
    """(devices, fsdp) -> (state, metrics of three steps, frozen after them), each mesh once."""
    cached, monkeypatch = {}, pytest.MonkeyPatch()

    def run(devices: int, fsdp: int):
        if (devices, fsdp) not in cached:
            monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
            c = config()
            mesh = jax.make_mesh(
                (devices // fsdp, fsdp),
                ("data", "fsdp"),
                devices=jax.devices()[:devices],
                axis_types=(AxisType.Auto,) * 2,
            )
            task = tasks.make(c, Folder.open(tiny_pipeline), jnp.float32, mesh)
            tx = optimizer(c)
            state = init_state(jax.tree.map(jnp.array, task.trained), tx, True)
            state = jax.device_put(state, sharding.params(mesh, state))
            frozen = jax.device_put(task.frozen, sharding.params(mesh, task.frozen))
            step, _ = make_step(task, c, tx, mesh, state)
            history = []
            for _ in range(3):
                data = jax.device_put(batch(), sharding.batch(mesh))
                state, metrics = step(state, frozen, data, jax.random.key(c.seed))
                history.append(jax.device_get(metrics))
            cached[devices, fsdp] = jax.device_get(state), history, jax.device_get(frozen), task
        return cached[devices, fsdp]

    yield run
    monkeypatch.undo()


@pytest.mark.skipif(jax.device_count() < 8, reason="takes minutes: FLAXKD_TEST_DEVICES=8 compares all meshes")
@pytest.mark.parametrize(("devices", "fsdp"), MESHES)
def test_every_mesh_equals_one_device_on_a_unet(run, devices, fsdp):
    one, many = run(1, 1), run(devices, fsdp)
    for a, b in zip(one[1], many[1], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-4, err_msg=name)
    for a, b in zip(jax.tree.leaves(one[0].params), jax.tree.leaves(many[0].params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)  # Adam divides by gradients that may be near zero


def test_the_student_learns_and_the_teacher_stays(run, tiny_pipeline):
    state, history, frozen, task = run(*MESHES[0])
    _, teacher = Folder.open(tiny_pipeline).load("unet")
    jax.tree.map(np.testing.assert_array_equal, frozen["teacher"], teacher)
    before, after = jax.tree.leaves(task.trained["unet"]), jax.tree.leaves(state.params["unet"])
    moved = [not np.array_equal(x, y) for x, y in zip(before, after, strict=True)]
    assert np.mean(moved) > 0.99
    assert set(frozen) == {"teacher", "text_encoder"} and set(state.params) == {"unet"}
    assert history[-1]["loss_feature"] < history[0]["loss_feature"]


def test_the_frozen_parts_are_in_compute_precision_and_the_student_in_float32(tiny_pipeline):
    task = tasks.make(config(), Folder.open(tiny_pipeline), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(task.frozen)} == {jnp.bfloat16.dtype}
    assert {x.dtype for x in jax.tree.leaves(task.trained)} == {np.dtype("float32")}
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    inputs = jax.eval_shape(task.prepare, jax.random.key(0), shapes(batch()))
    loss, metrics = jax.eval_shape(task.loss, shapes(task.trained), shapes(task.frozen), {}, inputs)
    assert {x.dtype for x in [loss, *metrics.values()]} == {jnp.float32.dtype}


def test_a_student_equal_to_the_teacher_has_no_distillation_loss(tiny_pipeline):
    task = tasks.make(config(student=None, train=("unet", "text_encoder")), Folder.open(tiny_pipeline), jnp.float32)
    assert set(task.trained) == {"unet", "text_encoder"} and task.frozen == {}
    assert task.configs.keys() == {"unet", "text_encoder"}


def test_a_teacher_without_signal_at_the_last_timestep(tmp_path):
    """v-prediction with `rescale_betas_zero_snr`: there, v is minus the latents, and Min-SNR weighs it with 0."""
    folder = Folder.open(write_plain(tmp_path)["teacher"])
    zero = folder.config("scheduler") | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    c = config(student=None, snr_gamma=5.0, caption_dropout=0.0)
    c.data.resolution = 32
    task = tasks.make(c, folder.replace({"scheduler": zero}, {}), jnp.float32)
    assert task.drawn_as is None
    moments = np.concatenate([np.full((2, 8, 8, 4), 3.0), np.full((2, 8, 8, 4), -60.0)], -1).astype(np.float32)
    data = task.random_batch(2, seed=0) | {"moments": moments}
    options = inputs.options(c, folder.replace({"scheduler": zero}, {}))
    ready = inputs.prepare(jax.random.key(0), data, **options, among=np.array([999]))
    np.testing.assert_allclose(ready.target, -3 * folder.scaling_factor, rtol=1e-5)
    assert not ready.noise_weights.any() and np.std(ready.noisy_latents) > 0.9
    loss, _ = jax.jit(task.loss)(task.trained, task.frozen, {}, ready._replace(noise_weights=jnp.ones(2)))
    assert 0 < loss < 1e3
    c.prediction_type = "v_prediction"  # of a teacher whose file says otherwise: drawn and exported with it
    assert tasks.make(c, folder, jnp.float32).drawn_as.config("scheduler")["prediction_type"] == "v_prediction"
