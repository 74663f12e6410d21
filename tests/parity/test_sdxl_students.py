"""The students of SDXL, cut from a tiny one with the real depths: diffusers loads them and draws the same picture."""

import json
import re

import jax
import numpy as np
import pytest

from configs import ssd_1b
from flaxkd import pretrained, students, train
from flaxkd.diffusion import samplers
from flaxkd.drawing import batches
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import sharding
from flaxkd.pretrained import Folder
from tests import running, tiny

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

DEPTHS = {  # in unet/config.json: numbers wherever the layers of a block agree
    "ssd_1b": ([1, 2, 4], [[4, 4, 10], [2, 1, 1], 1]),
    "vega": ([1, 1, 2], None),
    "koala_1b": ([0, 2, 6], None),
    "koala_700m": ([0, 2, 5], None),
}


def origin(name: str, key: str) -> str:
    """The teacher's tensor from which the student's was copied: by hand, for what has other numbers there."""
    if name.startswith("koala"):  # layers 0 and 2 of the up blocks
        return re.sub(r"(up_blocks\.\d\.\w+)\.1\.", r"\1.2.", key)
    if name == "ssd_1b":  # transformer blocks 0, 1, 2 and 6
        four = r"((?:down_blocks\.2|up_blocks\.0)\.attentions\.[01]\.transformer_blocks)\.3\."
        return re.sub(four, r"\1.6.", key)
    return key


@pytest.fixture(scope="module")
def cut(deep_xl, tmp_path_factory):
    """(name) -> the folder of a student as cut."""
    source, home = Folder.open(deep_xl), tmp_path_factory.mktemp("students")

    def save(name: str):
        if not (home / name).exists():
            student, teacher = students.get(name), source.config("unet")
            config = students.config(student, teacher)
            params = students.take(student, source.params("unet"), pretrained.shapes("unet", config))
            pretrained.save(home / name, source=source, parts={"unet": (config, params)})
        return home / name

    return save


@pytest.mark.parametrize("name", DEPTHS)
def test_diffusers_finds_every_tensor_of_a_student_where_it_belongs(deep_xl, cut, name):
    whole = diffusers.UNet2DConditionModel.from_pretrained(deep_xl / "unet").state_dict()
    out = cut(name)
    found = diffusers.StableDiffusionXLPipeline.from_pretrained(out).unet.state_dict()
    assert all(torch.equal(x, whole[origin(name, key)]) for key, x in found.items())
    config = json.loads((out / "unet" / "config.json").read_text())
    names = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    assert tuple(config.get(key) for key in names) == DEPTHS[name]


def test_a_student_draws_the_picture_of_diffusers(cut):
    out = cut("koala_700m")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(out)
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    options = dict(num_inference_steps=3, guidance_scale=3.0, height=32, width=32, output_type="np")
    expected = theirs("red apple", latents=torch.tensor(latents.transpose(0, 3, 1, 2)), **options).images
    ours = Pipeline.from_pretrained(out, np.float32, sharding.make_mesh(1, 1, jax.devices()[:1]))
    schedule = samplers.schedule("euler", ours.scheduler_config, 3)
    found = next(batches.draw(ours, ["red apple"], lambda i: (latents[i], None), schedule, 3.0, batch_size=1))
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(found / 255, expected[0], atol=3e-3)


@pytest.mark.slow
def test_a_run_leaves_a_student_that_diffusers_loads(tmp_path, monkeypatch):
    """What a teacher of two encoders is distilled to: recipe, cache, two steps, export and card."""
    monkeypatch.setenv("FLAXKD_CACHE", str(tmp_path / "cache"))
    one = sharding.make_mesh(1, 1, jax.devices()[:1])  # for one device, compiling takes half as long
    monkeypatch.setattr(train.sharding, "make_mesh", lambda data, fsdp: one)
    shallow = tiny.XL["unet"] | tiny.INNERMOST | {"transformer_layers_per_block": 1}  # less to compile
    teacher = tiny.write(tmp_path / "teacher", tiny.XL | {"unet": shallow})
    config = ssd_1b.get_config()
    config.teacher, config.student = str(teacher), "bk_sdxl_small"  # which keeps attentions of any depth
    config.data.source, config.data.resolution = str(running.write_pictures(tmp_path / "pictures")), 32
    config.batch_size, config.steps, config.sample.guidance, config.compilation_cache = 4, 2, 9.0, None
    config.validation.every = config.sample.every = 0
    config.log_every = 1
    train.run(config, tmp_path / "run")
    figures = [record for record in running.records(tmp_path / "run") if "loss" in record]
    assert [record["step"] for record in figures] == [1, 2] and all(np.isfinite(r["loss"]) for r in figures)
    pairs = students.feature_pairs(students.get("bk_sdxl_small"), "segmind_sdxl", Folder.open(teacher).config("unet"))
    assert len(pairs) == 12 and {f"feature/{own}" for own, _ in pairs} <= figures[0].keys()
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "diffusers")
    saved = running.state(tmp_path / "run", 2)["params"]["unet"]
    kernel = saved["conv_in"]["kernel"].transpose(3, 2, 0, 1).astype(np.float16)
    np.testing.assert_array_equal(pipeline.unet.conv_in.weight.detach().numpy(), kernel)
    card = (tmp_path / "run" / "diffusers" / "README.md").read_text()
    for said in ("guidance_scale=9)", "import StableDiffusionXLPipeline", "- stable-diffusion-xl"):
        assert said in card
