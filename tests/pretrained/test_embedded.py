"""The teacher in the package: whole, small, a Stable Diffusion 1.x in miniature, and able to draw."""

import json

import jax
import numpy as np
import pytest

from flaxkd import pretrained, recall, students
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import Folder, hub

FOLDER = hub.EMBEDDED


def test_it_is_a_small_whole_pipeline():
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 25e6, f"{size / 1e6:.1f} MB"
    for part in pretrained.PARTS:
        tensors = Folder.open(FOLDER).tensors(part)
        assert {x.dtype for x in tensors.values()} == {np.dtype("float16")}, part
        Folder.open(FOLDER).load(part)  # strict: nothing missing, nothing unexpected
    assert "OpenMoji" in (FOLDER / "README.md").read_text()  # its licence asks for the attribution
    assert json.loads((FOLDER / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_students_can_be_cut_from_it():
    config = Folder.open(FOLDER).config("unet")
    assert len(UNetConfig.from_dict(config).down) == 4
    _, teacher = Folder.open(FOLDER).load("unet")
    for student in students.TABLE:
        shapes = pretrained.shapes("unet", students.config(student, config))
        params = students.take(student, teacher, shapes)
        assert len(jax.tree.leaves(params)) < len(jax.tree.leaves(teacher))


def test_diffusers_loads_and_draws_without_being_told_a_dtype():
    """The weights are stored in half precision; networks of two precisions would not fit together."""
    pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert len({part.dtype for part in parts}) == 1
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("blue heart", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and image.std() > 0.01


def test_recall_counts_originals_among_the_nearest():
    originals = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8) * 10
    drawn = (
        originals[:3] + np.array([1, 18, 2], np.uint8)[:, None, None, None]
    )  # the second is nearest to the fourth
    order = recall.nearest(drawn, originals)
    assert order[:, 0].tolist() == [0, 3, 2]
    assert recall.recall(order, 1) == pytest.approx(2 / 3)
    assert recall.recall(order, 2) == pytest.approx(2 / 3)
    assert recall.recall(order, 3) == pytest.approx(2 / 3)
    assert recall.recall(order, 4) == 1.0
