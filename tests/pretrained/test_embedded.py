"""The teacher in the package: whole, small, and a Stable Diffusion 1.x in miniature."""

import json

import jax
import numpy as np

from flaxkd import pretrained, students
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
    for student in students.of(Folder.open(FOLDER).family):
        shapes = pretrained.shapes("unet", students.config(student, config))
        params = students.take(student, teacher, shapes)
        assert len(jax.tree.leaves(params)) < len(jax.tree.leaves(teacher))
