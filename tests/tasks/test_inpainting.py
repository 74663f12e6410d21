"""An inpainting teacher: its records, what its students see, and a run from pictures to an export."""

import json

import jax
import numpy as np
import pytest

from configs import tiny as tiny_config
from flaxkd import pretrained, tasks, train
from flaxkd.data import encoding, loader, masks
from flaxkd.evaluate.__main__ import main
from flaxkd.pretrained import Folder
from tests import tiny
from tests.running import assert_same_bits, write_pictures, write_plain


def widened(source: Folder) -> Folder:
    """The same pipeline, with the UNet of an inpainting one."""
    unet = source.config("unet") | {"in_channels": 9}
    return source.replace({"unet": unet}, {"unet": lambda: tiny.weights(pretrained.shapes("unet", unet), 0)})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """(configuration of a run that trains a small inpainting UNet, its teacher)."""
    folder = tmp_path_factory.mktemp("inpainting")
    source = widened(Folder.open(write_plain(folder)["teacher"]))
    unet = source.config("unet"), source.params("unet")
    teacher = pretrained.save(folder / "teacher", source=source, parts={"unet": unet})
    config = tiny_config.get_config()
    keys = {"teacher": str(teacher), "data.source": str(write_pictures(folder / "pictures")), "data.resolution": 32}
    keys |= {"student": "", "batch_size": 4, "steps": 2}
    keys |= {"validation.every": 2, "validation.examples": 4, "sample.every": 2, "sample.steps": 2}
    config.update_from_flattened_dict(keys | {"sample.prompts": ("red apple",), "sample.sampler": "dpmsolver++"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLAXKD_CACHE", str(folder / "cache"))
        yield config, teacher


def test_a_record_has_masks_and_the_latents_without_what_they_hide(home):
    config, teacher = home
    folder, pictures = Folder.open(teacher), train.open_pictures(config, "validation")
    reader = loader.Records(encoding.ensure(config, pictures, "validation", folder, np.float32))
    (found,) = reader.examples(3)
    assert found["masks"].dtype == np.uint8 and found["masked_latents"].dtype == np.float32
    vae, params = folder.load("vae")
    image = pictures[1]["image"]
    drawn = masks.of_picture(image)
    for k, mask in enumerate(drawn):
        np.testing.assert_array_equal(found["masks"][1, k, :, :, 0], mask[::4, ::4])
        seen = np.where(mask[..., None], 0, image / np.float32(127.5) - 1)
        mean = np.split(np.asarray(vae.apply({"params": params}, seen[None], method="encode")), 2, axis=-1)[0]
        np.testing.assert_allclose(found["masked_latents"][1, k], mean[0], atol=2e-3, rtol=2e-3)


def test_a_step_takes_one_mask_of_each_picture_and_changes_nothing_else(home):
    config, teacher = home
    task = tasks.make(config, Folder.open(teacher), np.float32)
    batch = task.random_batch(64, seed=0)
    plain = {name: x for name, x in batch.items() if name not in masks.FIELDS}
    ready, without = (task.prepare(jax.random.key(0), x) for x in (batch, plain))
    beside = np.asarray(ready.conditions.pop("beside"))
    assert_same_bits(ready._asdict(), without._asdict())
    scaled = Folder.open(teacher).scaling_factor * batch["masked_latents"]
    each = np.concatenate([batch["masks"].astype(np.float32), scaled], -1)
    same = np.isclose(each, beside[:, None], rtol=1e-6).all((2, 3, 4))
    assert (same.sum(1) == 1).all() and (same.sum(0) > 4).all()


def test_a_student_is_distilled_from_an_inpainting_teacher(tiny_pipeline, home):
    config = home[0].copy_and_resolve_references()
    config.student = "sd_tiny"
    task = tasks.make(config, widened(Folder.open(tiny_pipeline)), np.float32)
    assert task.configs["unet"]["in_channels"] == 9
    ready = jax.eval_shape(task.prepare, jax.random.key(0), task.random_batch(2, seed=0))
    loss, terms = jax.eval_shape(task.loss, task.trained, task.frozen, {}, ready)
    assert loss.shape == () and "feature/up_blocks.1" in terms


@pytest.mark.slow
def test_a_run_exports_and_is_evaluated(home, tmp_path):
    config, teacher = home
    workdir = tmp_path / "run"
    train.run(config, workdir)
    assert (workdir / "samples.png").is_file()
    index = json.loads((workdir / "diffusers" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    assert "import StableDiffusionInpaintPipeline" in (workdir / "diffusers" / "README.md").read_text()
    data = ["--data", config.data.source, "--out", tmp_path / "out", "--bins=1", "--examples=2", "--batch-size=4"]
    few = ["--sampler=dpmsolver++", "--steps=2"]
    main([str(x) for x in ("--model", workdir, "--teacher", teacher, *data, *few)])
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert 0 < rows[1]["loss_output"] < 1 and rows[1]["psnr"] > 10
