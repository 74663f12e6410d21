"""Files of weights as people have them: variants, shards, eight bits, pointers, pickles."""

import json
import os
import pickle
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flaxkd.pretrained import tensors

STEM = "diffusion_pytorch_model"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"


def put(path: Path, *keys: str) -> None:
    save_file({key: np.full(1, i, np.float16) for i, key in enumerate(keys)}, path)


def found(folder: Path, stem: str = STEM) -> list[str]:
    return [path.name for path in tensors.find(folder, stem, "owner/name")]


def shards(variant_first: str = "", variant_last: str = "") -> list[str]:
    return [f"{STEM}{variant_first}-0000{i}-of-00002{variant_last}.safetensors" for i in (1, 2)]


@pytest.mark.parametrize("index", ["safetensors.index.fp16", "safetensors.fp16.index", "fp16.safetensors.index", None])
@pytest.mark.parametrize("names", [shards(".fp16"), shards("", ".fp16")], ids=["before", "behind"])
def test_every_spelling_of_shards_of_a_variant(tmp_path, names, index):
    for i, name in enumerate(names):
        put(tmp_path / name, f"{i}.weight")
    if index:
        weight_map = {f"{i}.weight": name for i, name in enumerate(names)}
        (tmp_path / f"{STEM}.{index}.json").write_text(json.dumps({"weight_map": weight_map}))
    assert found(tmp_path) == names
    assert tensors.read(tensors.find(tmp_path, STEM, "")).keys() == {"0.weight", "1.weight"}
    (tmp_path / names[0]).unlink()
    with pytest.raises(FileNotFoundError, match=names[0]):
        found(tmp_path)


def test_the_full_weights_go_before_variants(tmp_path):
    order = [f"{STEM}{variant}.safetensors" for variant in ("", ".fp32", ".fp16", ".bf16", ".non_ema", ".mine")]
    for name in order:
        put(tmp_path / name, "a.weight")
    for i, name in enumerate(order):
        assert found(tmp_path) == [name]
        if i % 2:  # not pulled is as good as absent
            (tmp_path / name).write_text(POINTER)
        else:
            (tmp_path / name).unlink()
    assert (tmp_path / order[-1]).exists()


def test_pointers_alone_name_the_remedy(tmp_path):
    (tmp_path / f"{STEM}.safetensors").write_text(POINTER)
    for attempt in (lambda: found(tmp_path), lambda: tensors.read([tmp_path / f"{STEM}.safetensors"])):
        with pytest.raises(ValueError, match=rf"{STEM}\.safetensors is a pointer of git-LFS.* `git lfs pull`"):
            attempt()


class Trap:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "model.safetensors"])
def test_a_pickle_is_named_and_never_opened(tmp_path, name):
    trap = Trap()
    trap.path = tmp_path / "opened"
    (tmp_path / name).write_bytes(pickle.dumps(trap))
    with pytest.raises(ValueError, match="pickle") as error:
        tensors.read(tensors.find(tmp_path, "model", "owner/name"))
    assert name in str(error.value) and str(tmp_path) in str(error.value) and not trap.path.exists()


def write_float8(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A safetensors file by hand: its library writes no numpy array of eight bits."""
    names = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float32": "F32", "uint8": "F8_E8M0"}
    header, data = {}, b""
    for key, x in arrays.items():
        ends = [len(data), len(data) + x.nbytes]
        header[key] = {"dtype": names[x.dtype.name], "shape": list(x.shape), "data_offsets": ends}
        data += x.tobytes()
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_eight_bits_are_read_exactly_and_scaled(tmp_path, dtype):
    every = np.arange(256, dtype=np.uint8).view(dtype).reshape(2, 128)
    every = np.where(np.isfinite(every.astype(np.float32)), every, dtype(0))
    one, each = np.full((), 0.5, np.float32), np.array([[0.5], [3]], np.float32)
    small, bias = every[:, :4], np.array([1, 2], np.float32)
    write_float8(tmp_path / "a.safetensors", {"a.weight": every, "a.bias": bias, "scaled_fp8": small[0, :2]})
    write_float8(
        tmp_path / "b.safetensors",
        {"b.weight": small, "b.scale_weight": one, "b.scale_input": one, "c.weight": small, "c.weight_scale": each},
    )
    read = tensors.read([tmp_path / "b.safetensors", tmp_path / "a.safetensors"])
    assert read.keys() == {"a.weight", "a.bias", "scaled_fp8", "b.weight", "c.weight"}
    np.testing.assert_array_equal(read["a.weight"].astype(np.float32), every.astype(np.float32))
    np.testing.assert_array_equal(read["b.weight"], small.astype(np.float32) / 2)
    np.testing.assert_array_equal(read["c.weight"], small.astype(np.float32) * each)
    assert (read["a.weight"].dtype, read["a.bias"].dtype) == (np.float16, np.float32)


def test_scales_of_blocks_and_other_dtypes_are_refused(tmp_path):
    weight = np.zeros((4, 4), ml_dtypes.float8_e4m3fn)
    write_float8(tmp_path / "a", {"a.weight": weight, "a.weight_scale_inv": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"a\.weight_scale_inv has the shape \[2, 2\]"):
        tensors.read([tmp_path / "a"])
    write_float8(tmp_path / "b", {"a.weight": np.zeros((4, 4), np.uint8)})
    with pytest.raises(ValueError, match=r"b has tensors of a dtype .*F8_E8M0"):
        tensors.read([tmp_path / "b"])
