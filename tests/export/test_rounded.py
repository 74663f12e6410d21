"""Weights that are rounded for good: what is written, and what it says of itself."""

import jax
import numpy as np
import pytest

from convert import to_diffusers
from flaxkd import export
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.export import single_file
from flaxkd.pretrained import Folder
from flaxkd.weights import quantize
from flaxkd.weights.quantize import Quantization
from tests.export.trainings import shift

HOW = Quantization("w4", ("conv.*", r"linear_\d", "time_emb_proj"))  # attention alone is rounded: little to compile


@pytest.fixture
def workdir(workdir, tiny_pipeline, student):
    """Of a run that trained for `HOW`."""
    export.write_record(workdir, Folder.open(tiny_pipeline).as_quantized(HOW), {"unet": student[0]})
    return workdir


def convert(*arguments) -> None:
    to_diffusers.main([str(argument) for argument in arguments])


def same(a: dict, b: dict) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.slow
def test_a_run_is_exported_before_rounding_or_rounded(workdir, student, tmp_path):
    before = shift(student[1], -20)
    convert("--workdir", workdir, "--out", tmp_path / "float")
    convert("--workdir", workdir, "--out", tmp_path / "rounded", "--quantize", "w4")
    floats, rounded = Folder.open(tmp_path / "float"), Folder.open(tmp_path / "rounded")
    assert same(floats.params("unet"), before)
    assert same(rounded.params("unet"), quantize.on_grid(before, HOW)) and not same(rounded.params("unet"), before)
    assert (floats.quantization, rounded.quantization) == (HOW, HOW._replace(on_grid=True))
    assert same(rounded.params("vae"), floats.params("vae"))
    card = (tmp_path / "float" / "README.md").read_text()
    assert "trained to compute with int4 weights (`w4`)" in card and "--quantize w4 --out NEW` writes them" in card
    card = (tmp_path / "rounded" / "README.md").read_text()
    assert "rounded for int4 weights (`w4`)" in card and "In full precision are `conv.*`, `linear_\\d`, `time" in card
    types = [type(Pipeline.from_folder(folder, "").modules["unet"]) for folder in (floats, rounded)]
    assert [hasattr(kind, "_unquantized_type") for kind in types] == [True, False]


def test_any_model_is_rounded_as_a_folder_and_as_a_single_file(tiny_pipeline, tmp_path):
    convert("--model", tiny_pipeline, "--out", tmp_path / "new", "--quantize", "w8a8")
    convert("--model", tiny_pipeline, "--single-file", tmp_path / "new.safetensors", "--quantize", "w8a8")
    expected = quantize.on_grid(Folder.open(tiny_pipeline).params("unet"), Quantization("w8a8"))
    assert same(Folder.open(tmp_path / "new").params("unet"), expected)
    assert same(Folder.open(tmp_path / "new.safetensors").params("unet"), expected)
    with pytest.raises(ValueError, match=r"are rounded already, by w8a8"):
        export.rounded(Folder.open(tmp_path / "new"), "w4")


def test_a_model_is_written_in_the_dtype_that_was_asked_for(tiny_pipeline, tmp_path):
    convert("--model", tiny_pipeline, "--out", tmp_path / "half", "--dtype", "float16")
    half = Folder.open(tmp_path / "half")
    assert {x.dtype for part in half.parts for x in half.tensors(part).values()} == {np.dtype(np.float16)}
    for option, name in {"--out": "new", "--single-file": "new.safetensors"}.items():
        convert("--model", half.path, option, tmp_path / name, "--quantize", "w4", "--dtype", "float32")
    expected = quantize.on_grid(half.params("unet"), Quantization("w4"))
    for name in ("new", "new.safetensors"):
        new = Folder.open(tmp_path / name)
        assert same(new.stored("unet"), expected)
        assert {x.dtype for part in new.parts for x in jax.tree.leaves(new.stored(part))} == {np.dtype(np.float32)}


@pytest.mark.parametrize("ignored", [["--ema"], ["--no-ema"], ["--source", "x"], ["--for", "comfyui"], ["--private"]])
def test_an_option_that_would_be_ignored_is_refused(ignored, tiny_pipeline, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert("--model", tiny_pipeline, "--out", tmp_path / "new", *ignored)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {ignored[0].replace('--no-', '--')}: of --")
    assert not (tmp_path / "new").exists()


def test_single_files_hold_what_is_drawn_with(tiny_pipeline, tmp_path):
    """Of a model that was trained to be rounded, and whose folder holds the weights before that."""
    folder = Folder.open(tiny_pipeline).as_quantized(HOW)
    single_file.write(tmp_path / "new.safetensors", folder)
    assert same(Folder.open(tmp_path / "new.safetensors").params("unet"), quantize.on_grid(folder.params("unet"), HOW))
    again = export.rounded(folder, "w4")
    assert export.as_drawn(again) is again


def test_another_scheme_than_it_was_trained_for_is_refused(workdir, tmp_path):
    with pytest.raises(ValueError, match="--quantize w8: this UNet was trained to be rounded by w4: give that one"):
        export.export(workdir, tmp_path / "out", quantize="w8")
    assert not (tmp_path / "out").exists()
