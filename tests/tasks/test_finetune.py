"""Fine-tuning: the loss with pictures of a class, and whole runs on five pictures with one caption."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import dreambooth
from flaxkd import tasks, train
from flaxkd.diffusion import NoiseSchedule, min_snr_weights
from flaxkd.machine import files
from flaxkd.pretrained import Folder
from flaxkd.tasks.finetune import noise_loss
from flaxkd.training import step
from tests.running import assert_same_bits, records, state, write_plain


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_plain(tmp_path_factory.mktemp("home"))


def config_of(plain, home, **changes):
    config = dreambooth.get_config()
    keys = {"teacher": str(plain["teacher"]), "data.source": str(home / "subject"), "data.resolution": 32}
    keys |= {"batch_size": 8, "steps": 4, "validation.examples": 4, "sample.every": 0, "sample.steps": 2}
    keys |= {"prior.pictures": 3, "checkpoint.every": 2, "validation.every": 2, "log_every": 1, "compilation_cache": ""}
    config.update_from_flattened_dict(keys | changes)
    return config


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Five pictures without captions, and a cache of its own."""
    monkeypatch.setenv("FLAXKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "subject").mkdir()
    for i in range(5):
        Image.new("RGB", (40, 36), (0, 200, 20 * i)).save(tmp_path / "subject" / f"{i}.png")
    return tmp_path


def test_the_terms_are_means_over_their_own_examples_however_a_batch_is_cut():
    each, of_class = jnp.array([1.0, 10.0, 2.0, 20.0, 3.0, 30.0, 6.0, 40.0]), jnp.arange(8) % 2.0
    loss, metrics = noise_loss(each, of_class, 0.5)
    assert (loss, metrics["loss_instance"], metrics["loss_prior"]) == (3 + 12.5, 3, 25)
    pieces = step.mean(lambda x: noise_loss(*x, 0.5)[1], (each, of_class), 2)  # one of the subject alone, one without
    assert pieces == metrics
    assert noise_loss(each, None, 1.0) == (14, {"loss": 14, "loss_noise": 14})


def test_min_snr_weighs_subject_and_class_by_their_own_timesteps(plain, home):
    """diffusers' DreamBooth script weighs one half by the timesteps of both (diffusers#5791)."""
    folder = Folder.open(plain["teacher"])
    task = tasks.make(config_of(plain, home, snr_gamma=5.0), folder, jnp.float32)
    inputs = task.prepare(jax.random.key(0), task.random_batch(8, 0))
    _, metrics = task.loss(task.trained, task.frozen, {}, inputs)
    condition = folder.family.condition(
        {"text_encoder": folder.module("text_encoder", jnp.float32)}, task.trained, inputs.conditions
    )
    unet, seen = folder.module("unet", jnp.float32), inputs
    said = unet.apply({"params": task.trained["unet"]}, seen.noisy_latents, seen.timesteps, **condition)
    weights = min_snr_weights(NoiseSchedule.from_config(folder.config("scheduler")), seen.timesteps, 5.0)
    each = np.mean(np.square(said - seen.target), (1, 2, 3)) * weights
    np.testing.assert_allclose(metrics["loss_instance"], each[0::2].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss_prior"], each[1::2].mean(), rtol=1e-5)
    assert len({*np.asarray(weights).tolist()}) > 2


@pytest.mark.slow
def test_dreambooth_draws_its_class_and_resumes_bit_for_bit(plain, home):
    config, straight, again = config_of(plain, home), home / "straight", home / "again"
    train.run(config, straight)
    values = records(straight)
    assert {"loss_instance", "loss_prior", "validation/loss_prior"} <= {name for record in values for name in record}
    lines = files.read_jsonl(straight / "class" / "metadata.jsonl")
    assert [line["text"] for line in lines] == ["cat face"] * 3 and lines[2]["seed"] == [0, 2]

    shutil.copytree(straight, again)
    shutil.rmtree(again / "checkpoints" / "4")
    (again / "export.json").unlink()
    (again / "class" / "000001.png").unlink()  # a missing one is drawn as it was
    train.run(config, again)
    assert (again / "class" / "000001.png").read_bytes() == (straight / "class" / "000001.png").read_bytes()
    assert_same_bits(state(again, 4), state(straight, 4))

    other = config_of(plain, home, **{"prior.prompt": "dog face", "prior.folder": str(straight / "class")})
    with pytest.raises(ValueError, match=r"other settings:\n  prompt: 'cat face' there, 'dog face' here"):
        train.run(other, home / "other")
    foreign = config_of(plain, home, **{"prior.folder": str(home / "subject")})
    with pytest.raises(ValueError, match=r"5 pictures that flaxkd did not draw.*prior.pictures=0"):
        train.run(foreign, home / "foreign")
