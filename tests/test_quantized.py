"""The table of what quantization costs: which rows, and against what each error is."""

import argparse
import json

import numpy as np
import pytest

from flaxkd import pretrained, quantized
from flaxkd.evaluate import candidates
from flaxkd.machine import command
from flaxkd.pretrained import Folder
from flaxkd.weights import quantize
from flaxkd.weights.quantize import Quantization
from tests.running import write_pictures, write_plain


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A teacher, two models beside it, one of them trained for w4, and pictures."""
    home = tmp_path
    folder = Folder.open(write_plain(home)["teacher"])
    for name, scale in {"float": 2.0, "qat": 3.0}.items():
        params = folder.params("unet")
        params["conv_in"]["kernel"] *= np.float32(scale)
        source = folder.as_quantized(Quantization("w4") if name == "qat" else None)
        pretrained.save(home / name, source=source, parts={"unet": (folder.config("unet"), params)})
    write_pictures(home / "pictures")
    latents = lambda model, images, *_: {"moments": np.zeros((len(images), 8, 8, 8), np.float32)}
    monkeypatch.setattr(candidates, "encode", latents)
    return home


def predicted(model, seen, *_) -> np.ndarray:
    """In the place of a UNet: its first weight, and 1 more where it is rounded or computes with rounded numbers."""
    unet = model.pipeline.params["unet"]
    plain = Folder.open(model.folder.path).params("unet")
    kernel = lambda tree: np.asarray(tree["down_blocks.0"]["resnets.0"]["conv1"]["kernel"])
    more = not np.array_equal(kernel(unet), kernel(plain))
    more = more or hasattr(type(model.pipeline.modules["unet"]), "_unquantized_type")
    first = np.abs(np.asarray(unet["conv_in"]["kernel"])).max() / kernel_of_teacher
    return np.full_like(seen.noisy_latents, first + more)


kernel_of_teacher = 1.0


def test_each_model_has_the_rows_of_its_training(home, monkeypatch, capsys):
    monkeypatch.setattr(quantized, "predictions", predicted)
    teacher = Folder.open(home / "plain").params("unet")["conv_in"]["kernel"]
    monkeypatch.setitem(globals(), "kernel_of_teacher", np.abs(teacher).max())
    flags = [f"--model={home / 'float'}", f"--model={home / 'qat'}", f"--teacher={home / 'plain'}"]
    flags += [f"--data={home / 'pictures'}", "--examples=3", "--batch-size=4", f"--out={home / 'out'}"]
    monkeypatch.setattr(command, "keep_compiled_programs", lambda: None)
    quantized.main([*flags, "--scheme", "w8", "--scheme", "w8a8"])
    found = json.loads((home / "out" / "quantized.json").read_text())
    rows = {(row["model"], row["scheme"]): row for row in found["rows"]}
    assert list(rows) == [("float", "full"), ("float", "w8"), ("float", "w8a8"), ("qat", "full"), ("qat", "w4")]
    assert [row["to_itself"] for row in rows.values()] == pytest.approx([0, 1 / 2, 1 / 2, 0, 1 / 3])
    assert [row["to_first"] for row in rows.values()] == pytest.approx([0, 1 / 2, 1 / 2, 1 / 2, 1])
    assert [row["loss_output"] for row in rows.values()] == pytest.approx([1, 4, 4, 4, 9])
    shapes = Folder.open(home / "plain").shapes("unet")
    assert rows["float", "full"]["bytes"] == quantize.size(shapes, None)
    assert rows["qat", "w4"]["bytes"] == quantize.size(shapes, Quantization("w4")) < rows["float", "w8"]["bytes"]
    assert "| float | w8a8 | 50.00% | 50.00% | 4.00000 |" in capsys.readouterr().out
    assert not (home / "out" / "quantized.png").exists()


def test_a_rounded_folder_has_one_row(home):
    folder = Folder.open(home / "qat").as_quantized(Quantization("w4", on_grid=True))
    model, args = argparse.Namespace(folder=folder), argparse.Namespace(schemes=["w8"], full=("conv_out", "conv_inn"))
    assert quantized.schemes_of(model, args) == {"w4, rounded": None}
    model.folder = Folder.open(home / "float")
    with pytest.raises(ValueError, match="'conv_inn' names no layer of this UNet"):
        quantized.schemes_of(model, args)
    args.full = ["conv_out"]
    assert quantized.schemes_of(model, args) == {"full": None, "w8": Quantization("w8", ("conv_out",))}
