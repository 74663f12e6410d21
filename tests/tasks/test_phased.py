"""A model of a few phases learns where its teacher is after each, and leaves a folder that draws in as many steps."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import phased as configuration
from flaxkd import export, tasks, train
from flaxkd.data import sources
from flaxkd.diffusion import phases, samplers
from flaxkd.drawing import ways
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.pretrained import Folder
from flaxkd.tasks import phased
from flaxkd.tasks.losses import Prediction
from tests import tiny
from tests.running import assert_same_bits, records, state, write_pictures, write_plain
from tests.tasks.test_few_step import ALPHAS, stand_in, states


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("phased")
    write_plain(home)
    write_pictures(home / "pictures")
    return home


@pytest.fixture(autouse=True)
def cache(home, monkeypatch):
    monkeypatch.setenv("FLAXKD_CACHE", str(home / "cache"))
    return home / "cache"


def config_of(home, **changes):
    config = configuration.get_config()
    keys = {"teacher": str(home / "plain"), "data.source": str(home / "pictures"), "data.resolution": 32}
    keys |= {"batch_size": 4, "steps": 2, "validation.examples": 4, "validation.every": 1, "sample.every": 0}
    keys |= {"checkpoint.every": 1, "log_every": 1, "compilation_cache": "", "few_step.ways": 6}
    keys |= {"few_step.ode_steps": 8, "learning_rate": {"schedule": "constant_schedule", "value": 1e-3}}
    config.update_from_flattened_dict(keys | changes)
    return config


def make(home, **changes):
    return tasks.make(config_of(home, **changes), Folder.open(home / "plain"), np.dtype("float32"))


@pytest.fixture
def stand_ins(monkeypatch):
    """The UNet of the task is a small network with a "gain"."""

    def predict(unet, params, x, t, condition):
        return Prediction(stand_in(jnp, params["gain"], x, t, condition["encoder_hidden_states"]), {})

    monkeypatch.setattr(phased, "predict", predict)


def walk(noise, gain, text):
    """Where the stand-in is after each of four steps of DDIM, by its equation."""
    found = [noise]
    for t, after in ((999, 749), (749, 499), (499, 249), (249, None)):
        at, end = ALPHAS[t], 1.0 if after is None else ALPHAS[after]
        noise_pred = stand_in(np, gain, found[-1], np.full(len(noise), t), text)
        data = (found[-1] - np.sqrt(1 - at) * noise_pred) / np.sqrt(at)
        found.append(np.sqrt(end) * data + np.sqrt(1 - end) * noise_pred)
    return np.stack(found[1:], 1)


@pytest.mark.parametrize("huber", [None, 0.1])
def test_the_loss_is_the_distance_to_the_teacher_after_each_phase(home, stand_ins, huber):
    task = make(home, **{"few_step.huber": huber})
    inputs = task.prepare(jax.random.key(0), task.random_batch(3, 0))
    ways, text = np.float64(inputs.ways), states({"teacher": home / "plain"}, inputs.captions["input_ids"])
    assert ways.shape == (3, 5, 8, 8, 4) and inputs.guidance.shape == (3,)
    loss, metrics = task.loss({"unet": {"gain": jnp.float32(0.9)}}, task.frozen, {}, inputs)
    distance = walk(ways[:, 0], 0.9, text) - ways[:, 1:]
    terms = np.square(distance) if huber is None else np.sqrt(np.square(distance) + huber**2) - huber
    np.testing.assert_allclose(loss, terms.mean(), rtol=1e-4)
    each = [metrics[f"loss_phase_{k}"] for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(each, terms.mean((0, 2, 3, 4)), rtol=1e-4)
    assert metrics["loss"] == loss


def test_gradients_flow_through_all_steps(home, stand_ins):
    """The derivative is that of the whole walk, not that of each step from where the last one led."""
    task = make(home)
    inputs = task.prepare(jax.random.key(0), task.random_batch(2, 0))
    ways, text = np.float64(inputs.ways), states({"teacher": home / "plain"}, inputs.captions["input_ids"])
    of = lambda gain: np.square(walk(ways[:, 0], gain, text) - ways[:, 1:]).mean()
    found = jax.grad(lambda gain: task.loss({"unet": {"gain": gain}}, task.frozen, {}, inputs)[0])(jnp.float32(0.9))
    np.testing.assert_allclose(found, (of(0.9 + 1e-5) - of(0.9 - 1e-5)) / 2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_where_all_data_are_one_point_teacher_and_learner_meet_after_each_phase(kind):
    point, noise = 0.7, jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32)
    config = phases.scheduler_config(tiny.SCHEDULER, kind, 4)
    alphas = jnp.asarray(np.sqrt(ALPHAS), jnp.float32), jnp.asarray(np.sqrt(1 - ALPHAS), jnp.float32)

    def says(latents, timestep):
        alpha, sigma = (x[timestep.astype(int)] for x in alphas)
        added = (latents - alpha * point) / sigma
        return added if kind == "epsilon" else alpha * added - sigma * point

    ends = [749, 499, 249]
    first = (noise - alphas[0][999] * point) / alphas[1][999]
    expected = [alphas[0][t] * point + alphas[1][t] * first for t in ends] + [0 * noise + point]
    for schedule in (phases.learner(config), phases.teacher(config, 16)):
        np.testing.assert_allclose(phases.follow(says, noise, schedule), expected, atol=2e-4)


def test_ways_are_the_teachers_pictures_from_noise_and_drawn_once(home, cache, monkeypatch):
    config, folder = config_of(home), Folder.open(home / "plain")
    monkeypatch.setattr(ways, "SHARD", 4)
    task = tasks.make(config, folder, np.dtype("float32"))
    pictures = train.open_pictures(config, "train")
    reader = task.open_data(pictures, "train")
    (batch,) = reader.examples(6)
    assert {name: x.shape[1:] for name, x in batch.items()} == {name: x.shape for name, x in task.batch.items()}
    captions = reader.captions(6)
    assert len({*captions}) == 6 and {*captions} <= {*pictures.captions}
    assert (batch["guidance"] == 4).all()
    noise = batch["ways"][:, 0]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1

    trailing = folder.config("scheduler") | {"_class_name": "DPMSolverMultistepScheduler"}
    trailing |= {"timestep_spacing": "trailing", "steps_offset": 0, "clip_sample": False}
    pipeline = Pipeline.from_folder(folder.replace({"scheduler": trailing}, {}), "teacher")
    drawn = pipeline(captions, latents=noise, num_inference_steps=8, guidance_scale=4.0, progress=False)
    vae, params = folder.load("vae")
    decoded = vae.apply({"params": params}, batch["ways"][:, -1] / vae.config.scaling_factor, method="decode")
    decoded = np.clip(np.asarray(decoded) / 2 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(decoded, np.stack([np.asarray(x) for x in drawn]), atol=1.5)

    [place] = (cache / "ways").glob("*/cache.json")
    kept = sorted(place.parent.glob("*.array_record"))
    before = [file.read_bytes() for file in kept]
    place.unlink(), kept[1].unlink()
    asked, draw = [], ways._drawn
    monkeypatch.setattr(ways, "_drawn", lambda *args: asked.append(args[4]) or draw(*args))
    task.open_data(pictures, "train")
    task.open_data(pictures, "train")
    assert asked == [range(4, 6)] and [file.read_bytes() for file in kept] == before
    other = tasks.make(config_of(home, **{"few_step.guidance": (2.0, 3.0)}), folder, np.dtype("float32"))
    guidance = other.open_data(pictures, "train").examples(6)[0]["guidance"]
    assert 2 <= guidance.min() < guidance.max() <= 3 and len(asked) == 3


def test_captions_are_used_in_turn(home):
    pictures = sources.Source(3, lambda i: {"caption": "abc"[i]}, "")
    found = ways.captions_of(pictures, 7, 0)
    assert sorted(found[:3]) == sorted(found[3:6]) == ["a", "b", "c"] and found == ways.captions_of(pictures, 7, 0)
    known = sources.Source(3, lambda i: {}, "", captions=["a", "b", "c"])
    assert ways.captions_of(known, 7, 0) == found != ways.captions_of(known, 7, 1)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_leaves_a_folder_of_four_steps(home, tmp_path, one_device):
    config, straight, again = config_of(home), tmp_path / "straight", tmp_path / "again"
    train.run(config, straight)
    assert [r["validation/loss_phase_4"] > 0 for r in records(straight) if "validation/loss" in r] == [True] * 3
    shutil.copytree(straight, again)
    shutil.rmtree(again / "checkpoints" / "2")
    (again / "export.json").unlink()
    train.run(config, again)
    assert_same_bits(state(again, 2), state(straight, 2))

    out = straight / "diffusers"
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"] and index["_guidance_scale"] == 1.0
    folder = export.open_model(straight)
    written = folder.config("scheduler")
    assert (written["timestep_spacing"], written[samplers.OWN_STEPS]) == ("trailing", 4)
    assert samplers.usual_steps(None, written) == samplers.usual_steps("ddim", written) == 4
    assert samplers.usual_steps("dpmsolver++", written) == samplers.STEPS and folder.guidance == 1
    card = (out / "README.md").read_text()
    assert "num_inference_steps=4, guidance_scale=1)" in card and "It draws in few steps, 4 are usual, and" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"few_step.ode_steps": 10}, "ode_steps = 10 is no multiple of few_step.phases = 4: take 12"),
        ({"few_step.phases": 16, "few_step.ode_steps": 48}, "take another multiple of few_step.phases = 16"),
        ({"train": ("unet", "text_encoder")}, "phased trains the unet alone"),
        ({"data.buckets": ((32, 32), (24, 40))}, "in squares alone"),
        ({"prediction_type": "v_prediction"}, "phased keeps its teacher's"),
    ],
)
def test_what_cannot_be_trained_is_refused(home, changes, message):
    with pytest.raises(ValueError, match=message):
        make(home, **changes)
