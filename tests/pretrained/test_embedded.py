"""The teachers in the package: small, and a Stable Diffusion 1.x and an XL in miniature."""

import json

import jax
import numpy as np
import pytest

from flaxkd import pretrained, students
from flaxkd.pretrained import FAMILIES, Folder, hub

# (where it is, its name, family, bytes at most)
TEACHERS = [(hub.EMBEDDED, None, "sd1", 25e6), (hub.MINIATURES["miniature_xl"], "miniature_xl", "sdxl", 18e6)]


@pytest.mark.parametrize(("path", "name", "family", "most"), TEACHERS)
def test_it_is_small_and_whole(path, name, family, most):
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size < most, f"{size / 1e6:.1f} MB"
    folder = Folder.open(name)
    assert folder.path == path and folder.family is FAMILIES[family]
    for part in folder.parts:
        assert {x.dtype for x in folder.tensors(part).values()} == {np.dtype("float16")}, part
        folder.load(part)  # strict: nothing missing, nothing unexpected
    assert "OpenMoji" in (path / "README.md").read_text()  # its licence asks for the attribution
    assert json.loads((path / "model_index.json").read_text())["_class_name"] == FAMILIES[family].pipeline


@pytest.mark.parametrize(
    ("name", "rows"), [(None, ("sd_small", "bk_small", "sd_tiny")), ("miniature_xl", ("ssd_1b", "koala_700m"))]
)
def test_students_can_be_cut_from_it(name, rows):
    folder = Folder.open(name)
    config, teacher = folder.config("unet"), folder.params("unet")
    for student in map(students.get, rows):
        shapes = pretrained.shapes("unet", students.config(student, config))
        params = students.take(student, teacher, shapes)
        assert len(jax.tree.leaves(params)) < len(jax.tree.leaves(teacher))


def test_the_two_share_what_they_can():
    folder, other = Folder.open("miniature_xl"), Folder.open(None)
    assert [folder.place(part) for part in ("vae", "tokenizer")] == [
        folder.path / ".." / "teacher" / part for part in ("vae", "tokenizer")
    ]
    assert np.array_equal(folder.tokenize(["red apple"])["input_ids"], other.tokenize(["red apple"])["input_ids"])
