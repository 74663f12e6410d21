"""A consistency model is trained as diffusers' script does it, and leaves a folder that draws in four steps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lcm
from flaxkd import export, pretrained, tasks
from flaxkd.pretrained import Folder
from flaxkd.tasks import few_step
from flaxkd.tasks.losses import Prediction, pseudo_huber
from flaxkd.tasks.samples import schedule
from tests import tiny
from tests.running import records


def config(plain, **changes):
    c = lcm.get_config()
    c.teacher, c.data.resolution, c.few_step.ode_steps = str(plain["teacher"]), 32, 50
    c.update_from_flattened_dict(changes)
    return c


def make(plain, **changes):
    return tasks.make(config(plain, **changes), Folder.open(plain["teacher"]), np.dtype("float32"))


ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
spread = lambda x: np.reshape(x, (-1, 1, 1, 1))


def stand_in(xp, gain, x, t, states):
    """A small network in the place of a UNet, of numpy or jax (`xp`)."""
    said = states.mean(1)[:, None, None, :4]
    return gain * x * (spread(t) / 1000) + 0.3 * xp.cos(3 * x + spread(t) / 150) + xp.tanh(said)


@pytest.fixture
def stand_ins(monkeypatch):
    """The networks of a task are `stand_in` with their "gain"."""

    def predict(unet, params, x, t, condition):
        return Prediction(stand_in(jnp, params["gain"], x, t, condition["encoder_hidden_states"]), {})

    monkeypatch.setattr(few_step, "predict", predict)


def inputs(task, n=6, seed=0):
    prepared = task.prepare(jax.random.key(seed), task.random_batch(n, seed))
    return jax.tree.map(np.asarray, prepared)


def states(plain, ids):
    folder = Folder.open(plain["teacher"])
    return np.asarray(folder.module("text_encoder").apply({"params": folder.params("text_encoder")}, ids))


def script(plain, gains, noised, guidance, kind="epsilon"):
    """The loss of diffusers' train_lcm_distill_sd_wds.py, by its formulas. gains: of student, teacher and target."""
    student, teacher, target = gains
    x, t, ids = noised.noisy_latents, noised.timesteps, noised.conditions["input_ids"]
    cond = states(plain, ids)
    uncond = np.repeat(states(plain, Folder.open(plain["teacher"]).tokenize([None])["input_ids"]), len(x), 0)
    alpha_schedule, sigma_schedule = np.sqrt(ALPHAS), np.sqrt(1 - ALPHAS)

    def scalings_for_boundary_conditions(timestep, sigma_data=0.5, timestep_scaling=10.0):
        scaled = timestep_scaling * timestep
        return sigma_data**2 / (scaled**2 + sigma_data**2), scaled / (scaled**2 + sigma_data**2) ** 0.5

    def predicted_origin(out, t, x):
        alpha, sigma = spread(alpha_schedule[t]), spread(sigma_schedule[t])
        return (x - sigma * out) / alpha if kind == "epsilon" else alpha * x - sigma * out

    def predicted_noise(out, t, x):
        alpha, sigma = spread(alpha_schedule[t]), spread(sigma_schedule[t])
        return out if kind == "epsilon" else alpha * out + sigma * x

    def f(gain, x, t):
        c_skip, c_out = (spread(c) for c in scalings_for_boundary_conditions(t))
        return c_skip * x + c_out * predicted_origin(stand_in(np, gain, x, t, cond), t, x)

    ddim_timesteps = np.arange(1, 51) * 20 - 1
    previous = np.concatenate([ALPHAS[:1], ALPHAS[ddim_timesteps[:-1]]])
    index = (t + 1) // 20 - 1
    start, end = ddim_timesteps[index], np.maximum(ddim_timesteps[index] - 20, 0)
    np.testing.assert_array_equal(start, t)
    w = spread(guidance - 1)
    said = [stand_in(np, teacher, x, t, c) for c in (cond, uncond)]
    origins, noises = ([of(out, t, x) for out in said] for of in (predicted_origin, predicted_noise))
    pred_x0 = origins[0] + w * (origins[0] - origins[1])
    pred_noise = noises[0] + w * (noises[0] - noises[1])
    x_prev = spread(np.sqrt(previous[index])) * pred_x0 + spread(np.sqrt(1 - previous[index])) * pred_noise
    distance = f(student, x, start) - f(target, x_prev, end)
    return np.mean(np.sqrt(distance**2 + 0.001**2) - 0.001)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_script_of_diffusers(plain, stand_ins, kind):
    task = make(plain, prediction_type=kind, **{"few_step.guidance": (2.0, 9.0), "few_step.target": "average"})
    found = inputs(task)
    assert 2 < found.guidance.min() < 4 < found.guidance.max() < 9
    assert {*((found.noised.timesteps + 1) % 20)} == {0}
    gains = 0.9, 1.1, 0.8
    gain = lambda value: {"unet": {"gain": jnp.float32(value)}}
    frozen = task.frozen | {"teacher": {"gain": jnp.float32(gains[1])}}
    loss, metrics = task.loss(gain(gains[0]), frozen, gain(gains[2]), found)
    assert metrics["loss"] == loss
    np.testing.assert_allclose(loss, script(plain, gains, found.noised, found.guidance, kind), rtol=1e-4)


def test_gradients_flow_through_the_student_alone(plain, stand_ins):
    gain = {"unet": {"gain": jnp.float32(0.9)}}
    gradients = {}
    for target in ("online", "average"):
        task = make(plain, **{"few_step.target": target})
        frozen = task.frozen | {"teacher": {"gain": jnp.float32(1.1)}}
        of = jax.grad(lambda *trees, task=task: task.loss(*trees, inputs(task))[0], argnums=(0, 2), allow_int=True)
        gradients[target] = of(gain, frozen, gain)
    (online, nothing), (average, target) = gradients["online"], gradients["average"]
    assert online["unet"]["gain"] == average["unet"]["gain"] != 0  # the same target, which is a constant
    assert nothing["unet"]["gain"] == target["unet"]["gain"] == 0


def test_where_all_data_are_one_point_the_solver_is_exact(plain, monkeypatch):
    """The network that knows the point has no loss but at the last timestep, whose target is what it sees at 0."""
    point = np.float32(0.7)

    def predict(unet, params, x, t, condition):
        alpha, sigma = (spread(np.sqrt(a, dtype=np.float32)[np.asarray(t)]) for a in (ALPHAS, 1 - ALPHAS))
        return Prediction((x - alpha * point) / sigma, {})

    monkeypatch.setattr(few_step, "predict", predict)
    task = make(plain)
    found = inputs(task, 16)
    for timesteps in (np.arange(39, 1000, 64), np.full(16, 19)):
        timesteps = (timesteps + 1) // 20 * 20 - 1
        now = found._replace(noised=found.noised._replace(timesteps=timesteps))
        loss, _ = task.loss({"unet": {}}, task.frozen, {}, now)
        assert loss < 1e-6 if timesteps[0] > 19 else loss > 1e-2


def test_huber_is_square_near_zero_and_linear_beyond():
    a = jnp.array([1e-5, 2.0, -2.0])
    np.testing.assert_allclose(pseudo_huber(a, 0 * a, 1e-3), (5e-8 + 2 * 1.999) / 3, rtol=1e-4)
    np.testing.assert_allclose(pseudo_huber(a, 0 * a, None), 8 / 3, rtol=1e-6)
    np.testing.assert_allclose(pseudo_huber(a[:1] / 100, jnp.zeros(1), 1e-3), 5e-12, rtol=1e-4)  # not 0
    with pytest.raises(ValueError, match="cannot compare"):
        pseudo_huber(a, a[:2], 1e-3)


def test_the_guidance_as_an_input_changes_nothing_at_first(plain):
    task = make(plain, **{"few_step.embedded": True, "few_step.guidance": (2.0, 3.0)})
    assert task.configs["unet"]["time_cond_proj_dim"] == few_step.EMBEDDED
    own = Folder.open(plain["teacher"])
    kept = {name: tree for name, tree in task.trained["unet"].items() if name != "time_embedding"}
    before = own.params("unet")
    jax.tree.map(np.testing.assert_array_equal, kept, {name: before[name] for name in kept})
    assert not np.any(task.trained["unet"]["time_embedding"]["cond_proj"]["kernel"])
    assert task.drawn_as.guidance == 3.0  # of 2 to 3, the nearest to its own 7.5
    loss = jax.eval_shape(task.loss, task.trained, task.frozen, {}, inputs(task))[0]
    assert loss.shape == () and loss.dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"few_step.target": "average", "ema_decay": None}, "ema_decay is None: give it, 0.95 is diffusers'"),
        ({"train": ("unet", "text_encoder")}, "few_step trains the unet alone"),
        ({"few_step.ode_steps": 2000}, "few_step.ode_steps = 2000: the teacher has 1000"),
        ({"init": "gone/at all/"}, "gone"),
    ],
)
def test_what_cannot_be_trained_is_refused(plain, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(plain, **changes)


def test_a_distilled_student_begins_from_its_folder(plain, tiny_pipeline, tmp_path):
    """config.init is the UNet that learns, config.teacher the one whose ODE it learns."""
    folder = Folder.open(plain["teacher"])
    unet = folder.config("unet") | {"layers_per_block": 2}
    params = tiny.weights(pretrained.shapes("unet", unet), 1)
    student = pretrained.save(tmp_path / "student", source=folder, parts={"unet": (unet, params)})
    task = make(plain, init=str(student))
    assert task.configs["unet"]["layers_per_block"] == 2
    jax.tree.map(np.testing.assert_array_equal, task.trained["unet"], params)
    jax.tree.map(np.testing.assert_array_equal, task.frozen["teacher"], folder.params("unet"))
    with pytest.raises(ValueError, match="takes other latents or texts than the teacher"):
        make(plain, init=str(tiny_pipeline))
    wrong = folder.config("scheduler") | {"beta_end": 0.02}
    other = pretrained.save(tmp_path / "other", source=folder.replace({"scheduler": wrong}, {}), parts={})
    with pytest.raises(ValueError, match="has another noise schedule or prediction_type"):
        make(plain, init=str(other))


@pytest.mark.slow
def test_a_run_leaves_a_folder_that_draws_in_four_steps(place, plain, tmp_path):
    keys = {"task": "few_step", "init": plain["teacher"], "few_step.guidance": "(4.0,4.0)", "steps": 2}
    keys |= {"validation.every": 1, "few_step.ode_steps": 25, "checkpoint.every": 1}
    place.train(tmp_path / "run", **keys).end()
    assert [r["validation/loss"] > 0 for r in records(tmp_path / "run") if "validation/loss" in r] == [True] * 3
    out = tmp_path / "run" / "diffusers"
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "LCMScheduler"] and index["_guidance_scale"] == 1.0
    written = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert written["original_inference_steps"] == 25 and written["beta_end"] == tiny.SCHEDULER["beta_end"]
    assert len(schedule(Folder.open(out)).timesteps) == 4
    card = (out / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=1)" in card and "It draws in few steps, 4 are usual, and" in card
    (out / "model_index.json").unlink()  # without its export, a workdir says the same by its record
    again = export.open_model(tmp_path / "run")
    assert again.guidance == 1.0 and again.config("scheduler") == written
