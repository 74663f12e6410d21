"""`Pipeline` and `python -m flaxkd.generate` on a tiny pipeline: what they draw, write and refuse."""

import dataclasses
import json
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from convert import from_diffusers
from flaxkd import generate
from flaxkd.diffusion import samplers, sampling
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import sharding
from flaxkd.plan import compiling
from tests.running import ROOT

FEW = dict(num_inference_steps=2, guidance_scale=3.0, sampler="dpmsolver++", progress=False)
# Two compiled programs: of 1 and 2 pictures.
BOTH = ["red apple", "grinning face"]


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return Pipeline.from_pretrained(tiny_pipeline)


@pytest.fixture(scope="module")
def drawn(pipeline):
    return pipeline(BOTH, seed=3, **FEW)


@pytest.fixture
def command(tiny_pipeline, monkeypatch):
    """(*arguments) -> runs flaxkd.generate in this process."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # puts it back
    few = ["--model", str(tiny_pipeline), "--steps", "2", "--guidance", "3", "--sampler", "dpmsolver++"]
    return lambda *arguments: generate.main([*few, *map(str, arguments)])


def levels(a, b) -> int:
    """The largest difference of two pictures, of 255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_a_picture_knows_what_it_was_drawn_from(drawn, tiny_pipeline):
    assert [image.size for image in drawn] == [(32, 32)] * 2
    assert np.std(drawn[0]) > 10  # not a blank one
    assert drawn[1].info == {
        "prompt": "grinning face",
        "negative_prompt": "",
        "seed": "4",
        "num_inference_steps": "2",
        "guidance_scale": "3.0",
        "sampler": "dpmsolver++",
        "width": "32",
        "height": "32",
        "model": str(tiny_pipeline),
    }


@pytest.mark.slow
def test_devices_share_the_pictures_and_send_each_other_nothing(pipeline, drawn, tiny_pipeline, monkeypatch):
    one = Pipeline.from_pretrained(tiny_pipeline, mesh=sharding.make_mesh(1, 1, jax.devices()[:1]))
    assert pipeline.mesh.size == jax.device_count() > 1
    assert all(levels(a, b) <= 1 for a, b in zip(drawn, one(BOTH, seed=3, **FEW), strict=True))

    program = jax.jit(sampling.text_to_image, static_argnames=("modules", "condition"))

    def sent(**arguments):
        found.append(compiling.collectives(program.lower(**arguments).compile().as_text()))
        return np.zeros((jax.device_count(), 32, 32, 3))

    found = []
    monkeypatch.setattr(sampling, "text_to_image", sent)
    pipeline(BOTH, **FEW)
    assert found == [{}]


def test_a_picture_depends_on_its_own_seed_alone(pipeline, drawn):
    again = pipeline([*BOTH, "green apple"], seed=3, batch_size=2, **FEW)  # the second batch is filled up
    assert len(again) == 3
    alone = [pipeline(prompt, seed=3 + i, **FEW)[0] for i, prompt in enumerate(BOTH)]
    for expected, *same in zip(drawn, again[:2], alone, strict=True):
        assert max(levels(expected, image) for image in same) <= 1
    assert levels(drawn[0], pipeline(BOTH, seed=5, **FEW)[0]) > 10


@pytest.mark.parametrize(
    "other",
    [
        dict(negative_prompt="green apple"),
        dict(negative_prompt=["green apple", ""]),
        dict(guidance_scale=5.0),
        dict(sampler="ddim"),
        dict(sampler="euler"),
    ],
    ids=str,
)
def test_it_matters(pipeline, drawn, other):
    images = pipeline(BOTH, seed=3, **FEW | other)
    assert levels(drawn[0], images[0]) > 2
    assert other.get("negative_prompt") != ["green apple", ""] or levels(drawn[1], images[1]) == 0


@pytest.fixture
def asked(monkeypatch):
    """What the drawing program is asked for, without running it: a list of keyword arguments."""
    found = []
    blank = lambda **asked: found.append(asked) or np.zeros((*asked["inputs"]["input_ids"].shape[:1], 32, 32, 3))
    monkeypatch.setattr("flaxkd.diffusion.sampling.text_to_image", blank)
    return found


def test_a_model_draws_with_its_own_sampler_and_guidance(pipeline, asked):
    (picture,) = pipeline("red apple", progress=False)
    assert picture.info["sampler"] == "pndm" and picture.info["guidance_scale"] == "7.5"
    assert len(asked[0]["schedule"].timesteps) == 26 and (asked[0]["guidance"] == 7.5).all()
    folder = dataclasses.replace(pipeline.folder, drawn_with=3.0)
    config = pipeline.scheduler_config | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    own = dataclasses.replace(pipeline, folder=folder, scheduler_config=config)
    (picture,) = own("red apple", progress=False)
    expected = samplers.schedule("dpmsolver++:karras", pipeline.scheduler_config, 25)
    jax.tree.map(np.testing.assert_array_equal, asked[1]["schedule"], expected)
    assert (asked[1]["guidance"] == 3.0).all() and picture.info["guidance_scale"] == "3.0"


def test_several_pictures_of_one_prompt(pipeline, asked):
    drawn = pipeline(BOTH, num_images_per_prompt=2, negative_prompt=["", "tree"], seed=3, batch_size=4, progress=False)
    assert [image.info["prompt"] for image in drawn] == [BOTH[0], BOTH[0], BOTH[1], BOTH[1]]
    assert [image.info["seed"] for image in drawn] == ["3", "4", "5", "6"]
    assert [image.info["negative_prompt"] for image in drawn] == ["", "", "tree", "tree"]
    assert len(np.unique(asked[0]["latents"].reshape(4, -1), axis=0)) == 4


def test_the_command_lays_several_pictures_of_a_prompt_in_a_grid(command, asked, tmp_path):
    command("--prompt", "red apple", "--num-images", "3", "--out", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        assert image.text["prompt"] == "red apple" and image.text["seed"] == "0"
        assert image.width > 3 * 128 and image.height < 2 * 128


def test_a_model_of_few_steps_says_that_it_has_its_guidance(pipeline, asked):
    with pytest.warns(UserWarning, match="guidance_scale = 7.5: models of few steps, drawn by lcm, .* 1 is right"):
        pipeline("red apple", progress=False, guidance_scale=7.5, sampler="lcm")
    assert len(asked[0]["schedule"].timesteps) == 4


@pytest.mark.parametrize("guidance", [0.0, 0.5, -3.0])
def test_guidance_below_1_is_none_and_said(pipeline, asked, guidance):
    with pytest.warns(UserWarning, match=f"guidance = {guidance:g} is drawn as 1"):
        pipeline("red apple", progress=False, guidance_scale=guidance)
    assert asked[0]["guidance"] is None


def test_a_model_that_predicts_v_is_drawn_with_as_such(pipeline, drawn):
    config = pipeline.scheduler_config | {"prediction_type": "v_prediction"}
    images = dataclasses.replace(pipeline, scheduler_config=config)(BOTH, seed=3, **FEW)
    assert levels(drawn[0], images[0]) > 10


def test_numbers_that_are_none_are_an_error(pipeline):
    params = pipeline.params | {"unet": jax.tree.map(lambda x: x * np.nan, pipeline.params["unet"])}
    with pytest.raises(FloatingPointError, match="dtype float32"):
        dataclasses.replace(pipeline, params=params)(BOTH, **FEW)


def test_another_size_and_fresh_noise_in_each_step(pipeline):
    options = FEW | dict(width=36, height=32, sampler="euler_ancestral")
    draw = lambda seed: pipeline("red apple", seed=seed, **options)
    (first,), (again,), (other,) = draw(0), draw(0), draw(1)
    assert first.size == (36, 32)
    assert levels(first, again) == 0 and levels(first, other) > 10


def test_the_words_that_are_cut_are_named(pipeline, monkeypatch):
    monkeypatch.setattr("flaxkd.diffusion.sampling.text_to_image", lambda **_: np.zeros((1, 32, 32, 3)))
    with pytest.warns(UserWarning, match=r"takes 14 tokens.* has 18.* not seen is 'red apple red apple'") as record:
        pipeline("red  apple " * 9, negative_prompt="red apple", **FEW)
    assert len(record) == 1


REFUSED = [
    (dict(prompt=[]), "no prompt"),
    (dict(height=30), "height = 30 pixels is no multiple of 4, .* take 32"),
    (dict(width=0), "width = 0 .* take 4"),
    (dict(sampler="dpm3"), "'dpm3' is unknown .*euler_ancestral"),
    (dict(num_inference_steps=0), "steps = 0"),
    (dict(guidance_scale=float("nan")), "guidance_scale = nan"),
    (dict(guidance_rescale=1.1), "guidance_rescale = 1.1: it is 0 to 1"),
    (dict(seed=-1), "seed = -1"),
    (dict(batch_size=0), "batch_size = 0"),
    (dict(num_images_per_prompt=0), "num_images_per_prompt = 0"),
    (dict(negative_prompt=["a", "b"]), "negative_prompt has 2 entries for 1 prompts"),
    (dict(latents=np.zeros((1, 4, 8, 8))), r"\(1, 4, 8, 8\), and must have \(1, 8, 8, 4\)"),
    (dict(strength=0.5), "give one, or no strength"),
    (dict(mask_image=Image.new("L", (8, 8))), "give one too, or no mask_image"),
    (dict(image="gone.png"), "no picture gone.png"),
    (dict(image=__file__), "test_generate.py cannot be read as a picture"),
    (dict(image=Image.new("RGB", (8, 8)), strength=1.5), "strength = 1.5"),
    (dict(image=Image.new("RGB", (8, 8)), strength=0.1), "leaves none of 2 steps"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_refuses_before_any_compute(pipeline, monkeypatch, wrong, message):
    monkeypatch.setattr("flaxkd.diffusion.sampling.text_to_image", lambda **_: pytest.fail("it draws"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipeline(**{"prompt": "red apple"} | FEW | wrong)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"in_channels": 8}, "takes 4 channels beside the noisy latents"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "not refiners"),
    ],
)
def test_refuses_models_that_need_more_than_a_caption(tiny_pipeline, tmp_path, file, change, message):
    folder = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(folder)


def test_a_workdir_draws_with_its_export_or_its_newest_checkpoint(pipeline, tiny_pipeline, tmp_path):
    workdir = tmp_path / "run"
    from_diffusers.main(["--model", str(tiny_pipeline), "--out", str(workdir)])
    of_checkpoint = Pipeline.from_pretrained(workdir)
    assert of_checkpoint.name == f"{workdir}, step 0"
    jax.tree.map(np.testing.assert_array_equal, of_checkpoint.params, pipeline.params)
    assert of_checkpoint.modules == pipeline.modules  # equal modules share the compiled program
    shutil.copytree(tiny_pipeline, workdir / "diffusers")
    assert Pipeline.from_pretrained(workdir).name == str(workdir)


def test_the_command_writes_a_picture_with_its_settings(command, pipeline, tmp_path, capsys):
    out = tmp_path / "new" / "apple.png"
    command("--prompt", "red apple", "--negative_prompt", "grün", "--seed", "3", "--out", out)
    assert f"wrote {out}" in capsys.readouterr().out
    expected = pipeline("red apple", negative_prompt="grün", seed=3, **FEW)[0]
    with Image.open(out) as image:
        assert image.text == expected.info
        assert levels(image, expected) == 0


def test_the_command_lays_several_prompts_and_models_in_a_grid(command, tiny_pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("grinning face\n\n")
    other = shutil.copytree(tiny_pipeline, tmp_path / "other")
    out = tmp_path / "grid.png"
    command("--prompt", "red apple", "--prompts", tmp_path / "prompts.txt", "--model", other, "--out", out)
    with Image.open(out) as image:
        assert image.text["prompt"] == "red apple\ngrinning face"
        assert image.text["model"] == f"{tiny_pipeline}, {other}"
        assert image.width > 2 * 128 and image.height > 2 * 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: there is no prompt: give --prompt"),
        (["--prompts", "gone.txt"], "gone.txt: --prompts takes"),
        (["--prompt", "a", "--out", "a.jpg"], "a.jpg must end in .png"),
        (["--prompt", "a", "--width", "30"], "width = 30"),
        (["--prompt", "a", "--sampler", "ddim:karras"], "'ddim:karras' is unknown"),
        (["--prompt", "a", "--model", "./gone"], "error: there is no folder .*gone"),
    ],
)
def test_the_command_says_what_is_wrong(command, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flaxkd.diffusion.sampling.text_to_image", lambda **_: pytest.fail("it draws"))
    with pytest.raises(SystemExit, match=message):
        command(*arguments)
    assert not list(tmp_path.glob("*.png"))


def test_importing_the_package_is_cheap():
    code = "import sys, flaxkd; assert not {'jax', 'numpy'} & sys.modules.keys(); flaxkd.Pipelines"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "has no attribute 'Pipelines'" in result.stderr


def test_the_embedded_teacher_draws_by_default():
    pipeline = Pipeline.from_pretrained()
    assert pipeline.name == "embedded teacher" and pipeline.modules["unet"].config.sample_size == 16
