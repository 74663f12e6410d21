"""Weights of pipeline folders: dtypes, shards and damaged files."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxkd import pretrained
from flaxkd.pretrained import Folder


@pytest.fixture
def copy(tiny_pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "copy"))


def weights(folder: Path, part: str) -> Path:
    return folder / part / f"{pretrained.PARTS[part].stem}.safetensors"


def same_trees(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def test_load_in_another_dtype_and_from_bfloat16(copy):
    path = weights(copy, "text_encoder")
    stored = {key: x.astype(ml_dtypes.bfloat16) for key, x in load_file(path).items()}
    save_file(stored, path)
    assert all(x.dtype == ml_dtypes.bfloat16 for x in Folder.open(copy).tensors("text_encoder").values())
    _, params = Folder.open(copy).load("text_encoder")
    module, half = Folder.open(copy).load("text_encoder", ml_dtypes.bfloat16)
    assert module.dtype == ml_dtypes.bfloat16
    assert same_trees(half, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))


def test_shards_and_half_precision_variant(copy):
    path = weights(copy, "unet")
    whole = load_file(path)
    names = sorted(whole)
    files = {"a.safetensors": names[:100], "b.safetensors": names[100:]}
    for file, part in files.items():
        save_file({name: whole[name] for name in part}, path.parent / file)
    path.unlink()
    index = path.with_name(path.name + ".index.json")
    index.write_text(json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}}))
    assert same_trees(Folder.open(copy).tensors("unet"), whole)
    (path.parent / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        Folder.open(copy).tensors("unet")
    index.unlink()
    save_file(whole, path.parent / "diffusion_pytorch_model.fp16.safetensors")
    assert same_trees(Folder.open(copy).tensors("unet"), whole)


def test_a_truncated_file_names_itself(copy):
    path = weights(copy, "vae")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model\.safetensors cannot be read"):
        Folder.open(copy).tensors("vae")
