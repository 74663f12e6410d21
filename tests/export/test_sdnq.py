"""Folders in few bits for diffusers with sdnq: the integers are qwix's, in sdnq's layout. tests/parity/ runs them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import to_diffusers
from flaxkd.pretrained import Folder, keys
from flaxkd.weights import quantize
from flaxkd.weights.quantize import Quantization


def write(source, out, *arguments):
    to_diffusers.main(["--model", str(source), "--out", str(out), "--sdnq", *arguments])
    config = json.loads((out / "unet" / "config.json").read_text())["quantization_config"]
    return load_file(out / "unet" / "diffusion_pytorch_model.safetensors"), config


@pytest.mark.parametrize("scheme", ["w8", "w4"])
def test_integers_times_scales_are_the_rounded_weights(tiny_pipeline, tmp_path, scheme):
    folder, how = Folder.open(tiny_pipeline), Quantization(scheme)
    found, config = write(tiny_pipeline, tmp_path / "out", "--quantize", scheme)
    expected = keys.to_tensors(quantize.on_grid(folder.params("unet"), how))
    kept, tiled = [], config["modules_quant_config"]
    for name, x in expected.items():
        if (scales := found.get(name.removesuffix("weight") + "scale")) is None:
            assert np.array_equal(found[name], x) and found[name].dtype == x.dtype
            kept += [name] if x.ndim > 1 else []
            continue
        values = found[name]
        if scheme == "w4":
            assert values.dtype == np.uint8 and values.shape == (x.size // 2,)
            values = np.stack([values & 15, values >> 4], -1).astype(np.int8) - 8
        groups = [*scales.shape[:2], -1] if name in tiled else x.shape
        assert np.array_equal((values.reshape(groups).astype(np.float32) * scales).reshape(x.shape), x)
    assert bool(tiled) == (scheme == "w4") and all(x == {"group_size": 32} for x in tiled.values())
    assert config["weights_dtype"] == quantize.SCHEMES[scheme].weights
    assert sorted(config["modules_to_not_convert"]) == sorted(kept) and "conv_in.weight" in kept


def test_what_cannot_be_written_or_read_is_refused(tiny_pipeline, tmp_path):
    with pytest.raises(SystemExit, match="was not trained to be rounded: say how, such as --quantize w8"):
        write(tiny_pipeline, tmp_path / "out")
    with pytest.raises(SystemExit, match="would replace its source"):
        write(tiny_pipeline, tiny_pipeline, "--quantize", "w8")
    write(tiny_pipeline, tmp_path / "out", "--quantize", "w8")
    with pytest.raises(ValueError, match="is of weights in few bits, and flaxkd reads floats"):
        Folder.open(tmp_path / "out").module("unet")


def test_all_networks_have_the_dtype_that_was_asked_for(tiny_pipeline, tmp_path):
    write(tiny_pipeline, tmp_path / "out", "--quantize", "w8", "--dtype", "float16")
    found = Folder.open(tmp_path / "out")
    assert {x.dtype for part in ("vae", "text_encoder") for x in found.tensors(part).values()} == {np.dtype(np.float16)}
