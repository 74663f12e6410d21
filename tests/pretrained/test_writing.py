"""Pipeline folders are written whole, or not at all."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxkd import pretrained
from flaxkd.pretrained import Folder
from tests.pretrained.test_folder import same_trees


def shifted(source: Path, out: Path) -> tuple[Path, dict]:
    """Writes a folder with a new UNet, all else from `source`; returns it and the parameters of that UNet."""
    _, params = Folder.open(source).load("unet")
    params = jax.tree.map(lambda x: x + np.float32(0.5), params)
    config = Folder.open(source).config("unet")
    pretrained.save(
        out, source=Folder.open(source), parts={"unet": (config, params)}, dtype=np.float32, card="# card\n"
    )
    return out, params


@pytest.fixture(scope="module")
def exported(tiny_pipeline, tmp_path_factory) -> tuple[Path, dict]:
    return shifted(tiny_pipeline, tmp_path_factory.mktemp("exported") / "pipeline")


@pytest.fixture
def copy(tiny_pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "copy"))


def test_save_replaces_an_export_but_nothing_else(tiny_pipeline, exported, copy, tmp_path):
    out, _ = exported
    before = Folder.open(out).tensors("unet")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photograph.png").touch()
    with pytest.raises(ValueError, match="not an earlier export"):
        pretrained.save(tmp_path / "mine", source=Folder.open(out), parts={})
    for parent in (copy, copy.parent):
        with pytest.raises(ValueError, match=r"not an earlier export|would replace"):
            pretrained.save(parent, source=Folder.open(copy), parts={})
    assert (tmp_path / "mine" / "photograph.png").exists() and (copy / "unet").exists()

    pretrained.save(copy, source=Folder.open(out), parts={})
    assert same_trees(Folder.open(copy).tensors("unet"), before)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy", "mine"]


def test_a_failed_save_leaves_the_earlier_export_as_it_was(exported, copy):
    out, params = exported
    before = Folder.open(copy).tensors("unet")
    config = Folder.open(out).config("unet")
    wrong = config | {"block_out_channels": [8, 16, 16, 32]}
    with pytest.raises(ValueError, match="mis-shaped"):
        pretrained.save(copy, source=Folder.open(out), parts={"unet": (wrong, params)})
    large = jax.tree.map(lambda x: x * np.float32(1e6), params)
    with pytest.raises(ValueError, match="too large for float16"):
        pretrained.save(copy, source=Folder.open(out), parts={"unet": (config, large)}, dtype=np.float16)
    assert same_trees(Folder.open(copy).tensors("unet"), before)
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_an_unsupported_pipeline_is_refused(copy, tmp_path):
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline"):
        pretrained.save(tmp_path / "out", source=Folder.open(copy), parts={})
