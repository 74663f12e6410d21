"""The program as a person runs it, on a tiny pipeline: what it leaves. Kills and signals are in tests/faults/."""

import contextlib
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from configs import tiny
from flaxkd import train
from tests.data.test_sources import image_folder
from tests.running import EVERY, LONG, STEPS, assert_same_bits, records, state


@pytest.fixture(scope="module")
def distil(place, tiny_pipeline):
    """(workdir, **keys) -> a started training of sd_tiny."""
    keys = LONG | {"teacher": tiny_pipeline, "student": "sd_tiny"}
    return lambda workdir, **more: place.train(workdir, pictures=True, **keys | more)


@pytest.fixture(scope="module")
def finished(distil, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "straight"
    return workdir, distil(workdir).end(within=600)


def test_a_run_leaves_what_it_says(finished):
    workdir, output = finished
    for name in ("samples.png", "curves.png", "metrics.jsonl", "diffusers/README.md", "config.json"):
        assert (workdir / name).is_file(), name
        assert name.split("/")[0] in output or name == "config.json"
    assert list((workdir / "tensorboard").iterdir())
    assert "next: " in output
    with Image.open(workdir / "samples.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 2 * 128  # three columns, two prompts
    pairs = {
        f"feature/{s}"
        for s in (
            "down_blocks.0",
            "down_blocks.1",
            "down_blocks.2",
            "up_blocks.0",
            "up_blocks.1",
            "up_blocks.2",
        )
    }
    losses = {"loss", "loss_noise", "loss_output", "loss_feature"} | pairs
    training = [r for r in records(workdir) if "grad_norm" in r]
    validation = [r for r in records(workdir) if "validation/loss" in r]
    assert [r["step"] for r in training] == list(range(1, STEPS + 1))
    assert [r["step"] for r in validation] == list(range(0, STEPS + 1, EVERY))
    assert training[0].keys() == losses | {"step", "learning_rate", "grad_norm", "images_per_second"}
    assert validation[0].keys() == {f"validation/{name}" for name in losses} | {"step"}
    assert validation[-1]["validation/loss_output"] < validation[0]["validation/loss_output"]
    assert validation[-1]["validation/loss_feature"] < 0.9 * validation[0]["validation/loss_feature"]


def test_the_teacher_is_not_in_the_checkpoint(finished):
    saved = state(finished[0])
    assert set(saved) == {"step", "params", "opt_state", "ema", "health"}
    assert set(saved["params"]) == set(saved["ema"]) == {"unet"}
    assert "mid_block" not in saved["params"]["unet"]  # of sd_tiny's teacher alone


def test_the_export_has_the_averaged_weights(finished):
    kernel = state(finished[0])["ema"]["unet"]["conv_in"]["kernel"]
    exported = load_file(finished[0] / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not any(name.startswith("mid_block") for name in exported)
    np.testing.assert_array_equal(exported["conv_in.weight"], kernel.transpose(3, 2, 0, 1).astype(np.float16))


def test_a_workdir_of_another_run_is_refused(finished, distil):
    output = distil(finished[0], seed=1).end(1)
    assert "holds a run of another configuration" in output and "seed: 0 there, 1 here" in output
    assert "--workdir" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(place, tmp_path):
    keys = {"learning_rate.peak_value": 1e30, "learning_rate.warmup_steps": 0, "bad_steps.in_a_row": 3}
    output = place.train(tmp_path / "nan", **keys).end(1)
    assert "the loss of step" in output and "last good checkpoint" in output and "Traceback" not in output
    assert "skipped, 1 so far" in output and "the last 3 steps were skipped" in output
    assert "NaN" not in (tmp_path / "nan" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_an_autoencoder_is_trained_on_pixels(place, plain, tmp_path):
    workdir = tmp_path / "vae"
    output = place.train(workdir, train="('vae',)", **LONG | {"validation.examples": 8}).end()
    before, *_, after = (r["validation/psnr"] for r in records(workdir) if "validation/psnr" in r)
    assert after > before and "curves.png, then" in output and not (workdir / "samples.png").exists()
    read = lambda folder: json.loads((folder / "vae" / "config.json").read_text())
    trained, untrained = read(workdir / "diffusers"), read(plain["teacher"])
    assert trained.pop("scaling_factor") > 0 and trained == untrained  # which has none of its own


def test_a_run_with_buckets_resumes_bit_for_bit(plain, tmp_path, monkeypatch, one_device):
    """Half of its pictures are squares, the others wide. It is resumed in the middle."""
    monkeypatch.setenv("FLAXKD_CACHE", str(tmp_path / "cache"))
    image_folder(tmp_path / "pictures", [f"thing {i}" for i in range(40)], [(40, 40), (90, 60)] * 20)
    taken = []
    monkeypatch.setattr(train, "shape", lambda batch, real=train.shape: taken.append(real(batch)) or real(batch))
    config = tiny.get_config()
    keys = {"data.source": str(tmp_path / "pictures"), "data.buckets": ((32, 32), (32, 48)), "data.resolution": 32}
    keys |= {"teacher": str(plain["teacher"]), "student": "", "batch_size": 4, "steps": 6, "checkpoint.every": 3}
    config.update_from_flattened_dict(keys | {"validation.every": 0, "sample.every": 0, "ema_decay": 0.9})

    straight, again = tmp_path / "straight", tmp_path / "again"
    train.run(config, straight)
    compiled, first, last = ([moments for _, moments in taken[i:j]] for i, j in ((0, 2), (2, 5), (5, 8)))
    assert {*compiled} == {*first} == {*last} == {(4, 8, 8, 8), (4, 8, 12, 8)}
    shutil.copytree(straight, again)
    shutil.rmtree(again / "checkpoints" / "6")
    (again / "export.json").unlink()
    train.run(config, again)
    assert_same_bits(state(again, 6), state(straight, 6))


def test_validation_counts_each_example_once_whatever_its_size():
    held_out = [{"x": np.array([1.0, 2.0, 3.0])}, {"x": np.array([10.0])}]
    writer = SimpleNamespace(pause=lambda _: contextlib.nullcontext(), write=lambda *_: None)
    evaluate = lambda *arguments: {"loss": arguments[-1]["x"].mean()}
    setup = SimpleNamespace(held_out=held_out, evaluate=evaluate, frozen={}, writer=writer)
    now = SimpleNamespace(step=0, ema={}, params={})
    assert train.validate(setup, now) == {"validation/loss": 4.0}


def test_every_recipe_has_a_workdir_of_its_own():
    names = ("configs/small.py", "configs/small.py:", "configs/small.py:sd15", "/elsewhere/my.py:a")
    workdirs = [str(train.default_workdir(name)) for name in names]
    assert workdirs == ["runs/small", "runs/small", "runs/small-sd15", "runs/my-a"]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("batch_size", 3, "multiple of 4"),
        ("student", "sd_tinny", "did you mean 'sd_tiny'"),
        ("teacher", "nobody/nothing", "Without network"),
        ("data.source", "nowhere", "no data set 'nowhere'"),
        ("learning_rate.schedule", "cosine", "optax.schedules"),
        ("timestep_sampling", "snr", "neither 'uniform' nor 'min_snr'"),
        ("timestep_sampling", "min_snr", "snr_gamma: give it"),
    ],
)
def test_errors_come_before_any_compute(home, tiny_pipeline, tmp_path, key, value, message):
    config = tiny.get_config()
    values = {"teacher": str(tiny_pipeline), "data.source": str(home / "pictures"), "data.resolution": 32}
    config.update_from_flattened_dict(values | {key: value})
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        train.run(config, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
