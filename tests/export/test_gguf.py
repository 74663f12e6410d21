"""GGUF files hold every tensor, in blocks where they may, and are read back by the package gguf."""

import json

import gguf as package
import numpy as np
import pytest

from convert import to_gguf
from flaxkd import students
from flaxkd.export import gguf, single_file
from flaxkd.pretrained import ARCHITECTURES, Folder
from flaxkd.pretrained.single_file import HEADER


@pytest.mark.parametrize(("kind", "bits", "error"), [("Q8_0", 8.5, 0.006), ("Q4_0", 4.5, 0.09)])
def test_every_tensor_is_there_and_near(tmp_path, capsys, kind, bits, error):
    file, folder = tmp_path / "teacher.gguf", Folder.open(None)
    with pytest.warns(UserWarning, match=r"stable-diffusion\.cpp has no UNet like this one; it is read by: diffusers"):
        to_gguf.main(["--out", str(file), "--type", kind])
    assert f" {bits:.2f} bits a weight" in capsys.readouterr().out
    reader, expected = package.GGUFReader(file), single_file.tensors(folder, gaps=False)
    assert {tensor.name for tensor in reader.tensors} == {*expected}
    types, squares = {}, []
    for tensor in reader.tensors:
        x, wanted = package.quants.dequantize(tensor.data, tensor.tensor_type), expected[tensor.name]
        assert tensor.tensor_type.name == gguf.type_of(tensor.name, wanted.shape, kind)
        types.setdefault(tensor.tensor_type.name, []).append(tensor.name)
        x = x.reshape(wanted.shape)
        if tensor.tensor_type.name == kind:
            assert tensor.n_bytes * 8 == bits * wanted.size
            squares.append(np.mean((x - wanted) ** 2) / np.mean(wanted.astype(np.float32) ** 2))
        else:
            np.testing.assert_allclose(x, wanted, rtol=2**-10, atol=1e-7)
    assert error / 2 < np.sqrt(np.mean(squares)) < error
    assert len(types[kind]) > 100 and {*types} == {"F32", "F16", kind}
    assert reader.fields["general.architecture"].contents() == "sd1"
    assert json.loads(reader.fields[HEADER].contents())["unet"] == folder.config("unet")


def test_what_is_kept_in_float():
    assert gguf.type_of("model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320), "Q8_0") == "Q8_0"  # SD 2.x
    assert gguf.type_of("model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320, 1, 1), "Q8_0") == "F16"
    assert gguf.type_of("model.diffusion_model.input_blocks.0.0.weight", (320, 4, 3, 3), "Q4_0") == "F16"
    assert gguf.type_of("model.diffusion_model.time_embed.0.weight", (1280, 320), "Q4_0") == "F16"
    assert gguf.type_of("cond_stage_model.model.token_embedding.weight", (49408, 1024), "Q4_0") == "F16"
    assert gguf.type_of("model.diffusion_model.out.0.weight", (320,), "Q8_0") == "F32"


def test_layers_are_counted_as_the_program_counts_them(monkeypatch, tmp_path):
    counted = {}
    monkeypatch.setattr(single_file, "tensors", lambda folder, gaps: counted.update(gaps=gaps) or {})
    for name, gaps in (("sd_tiny", True), ("sd_small", False)):
        row = ARCHITECTURES["sd15"]
        unet = students.config(students.get(name), row.unet)
        _, able = gguf.write(tmp_path / "a.gguf", Folder.open(None).replace({"unet": unet}, {}), "F16")
        assert counted.pop("gaps") is gaps and ("sd.cpp" in able) is gaps


def test_mistakes_are_named(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.gguf"):
        gguf.write(tmp_path / "a.safetensors", Folder.open(tiny_pipeline), "Q8_0")
    huge = {"unet": lambda: _scaled(Folder.open(tiny_pipeline).params("unet"))}
    with pytest.raises(ValueError, match=r"has numbers too large for float16"):
        gguf.write(tmp_path / "a.gguf", Folder.open(tiny_pipeline).replace({}, huge), "Q8_0")
    assert not list(tmp_path.iterdir())


def _scaled(params: dict) -> dict:
    return params | {"conv_in": {name: x * np.float32(1e6) for name, x in params["conv_in"].items()}}
