"""A task that is not in the package is trained, resumed, exported, planned and timed, and nothing else knows of it."""

import signal

import numpy as np
import pytest

from configs import small
from flaxkd import tasks
from flaxkd.bench import works
from flaxkd.plan import compiling, devices, table
from flaxkd.pretrained import Folder
from tests.running import EVERY, LONG, STEPS, assert_same_bits, records, state

# The text encoder learns to say everything a tenth louder.
OWN = """
import jax
import jax.numpy as jnp

from flaxkd.training.task import Task


def louder(config, folder, dtype, mesh=None):
    text_encoder = folder.module("text_encoder", dtype)
    params = folder.params("text_encoder")

    def prepare(key, batch):
        ids = batch["input_ids"]
        return ids, jax.random.normal(key, (len(ids), 1, 1))

    def loss(trained, frozen, average, inputs):
        ids, noise = inputs
        states = text_encoder.apply({"params": trained["text_encoder"]}, ids)
        wanted = text_encoder.apply({"params": frozen["before"]}, ids)
        value = jnp.mean((states - (1.1 + 0.01 * noise) * wanted) ** 2)
        return value, {"loss": value}

    return Task(
        batch={"input_ids": jax.ShapeDtypeStruct((folder.text_length,), jnp.int32)},
        trained={"text_encoder": params},
        frozen={"before": params},
        prepare=prepare,
        loss=loss,
        configs={"text_encoder": folder.config("text_encoder")},
    )
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of a module that Python finds in this process."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_task.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.mark.slow
def test_it_is_trained_resumed_and_exported(own, place, plain, tmp_path):
    found = f"import sys; sys.path.append({str(own)!r})\n"
    start = lambda workdir: place.train(workdir, before=found, task="own_task:louder", **LONG)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    start(straight).end()
    losses = [r["validation/loss"] for r in records(straight) if "validation/loss" in r]
    assert len(losses) == STEPS // EVERY + 1 and min(losses) < 0.95 * losses[0]  # it is too small to learn steadily
    assert (straight / "curves.png").is_file() and not (straight / "samples.png").exists()
    before, after = (Folder.open(x).params("text_encoder") for x in (plain["teacher"], straight / "diffusers"))
    final = lambda params: params["text_model"]["final_layer_norm"]["scale"]
    assert np.mean(final(after)) > np.mean(final(before))

    job = start(killed)
    job.until((killed / "checkpoints" / str(EVERY)).exists, "a save")
    job.send(signal.SIGKILL)
    job.end(None)
    assert "resuming at step" in start(killed).end()
    assert_same_bits(state(killed), state(straight))


def config_of(plain):
    config = small.get_config()
    values = {"task": "own_task:louder", "teacher": str(plain["teacher"]), "student": "", "batch_size": 8}
    config.update_from_flattened_dict(values | {"data.resolution": 32})
    return config


def test_it_is_planned(own, plain, monkeypatch, tmp_path):
    import jax

    monkeypatch.setenv("FLAXKD_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "topology", lambda target: jax.devices()[:4])
    monkeypatch.setattr(compiling, "assigned", compiling.whole)  # these are CPUs, whose memory is soon known
    row = table.row(config_of(plain), devices.target("v5e:2x2"))
    size = Folder.open(plain["teacher"]).count("text_encoder")
    assert row["held"]["parameters"] == 4 * size and row["held"]["batch"] == 2 * 4 * 16
    assert row["fits"] and row["image_flops"] > 0 and row["collectives"]["all-reduce"][0] > 0


def test_it_is_timed(own, plain):
    config = config_of(plain)
    subject = works.subject("teacher", config, Folder.open(plain["teacher"]), steps=1)
    prepared = works.prepare(subject, "train")
    assert prepared.flops > 0 and np.isfinite(prepared.call()["loss"])


@pytest.mark.parametrize("name", ["own_task:quieter", "no_such_module:task", "distil"])
def test_a_task_that_cannot_be_found_is_refused(own, plain, name):
    config = config_of(plain)
    config.task = name
    with pytest.raises(ValueError, match=rf"task = '{name}' is not in the table \(distill, finetune, "):
        tasks.make(config, Folder.open(plain["teacher"]), np.float32)


def test_parts_that_no_task_trains_together_are_refused(plain):
    config = config_of(plain)
    config.update({"task": None, "train": ("unet", "vae")})
    with pytest.raises(ValueError, match=r"train = .*text_encoder_2 \(distill\); .*\(finetune\); vae"):
        tasks.make(config, Folder.open(plain["teacher"]), np.float32)
