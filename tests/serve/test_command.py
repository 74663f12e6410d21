"""`python -m flaxkd.serve`: what it loads, and what it refuses before anything is loaded."""

import argparse

import jax
import numpy as np
import pytest

from flaxkd.pretrained import Folder, lora_files, lora_writing
from flaxkd.serve import __main__ as serve
from flaxkd.weights import lora


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("runs/small", ("small", "runs/small")),
        ("small=runs/other", ("small", "runs/other")),
        ("teacher=", ("teacher", None)),
        ("sd 1.5=owner/name", ("sd 1.5", "owner/name")),
        ("models/dream.safetensors", ("dream", "models/dream.safetensors")),
        ("files/ink.safetensors:0.8", ("ink", "files/ink.safetensors:0.8")),
        ("ink=files/ink.safetensors:0.8", ("ink", "files/ink.safetensors:0.8")),
    ],
)
def test_a_model_has_a_name(typed, expected):
    assert serve.named(typed) == expected


def test_a_lora_is_a_further_model_beside_each(tiny_pipeline, tmp_path):
    folder = Folder.open(tiny_pipeline)
    adapter = jax.tree.map(lambda x: x + np.float32(0.1), lora.init(folder.shapes("unet"), "attention", 2, 0))
    file = lora_writing.write(tmp_path / "ink.safetensors", {"unet": adapter}, "peft", {})
    models = {"model": [f"a={tiny_pipeline}", f"b={tiny_pipeline}"], "vae": None, "dtype": "float32", "size": []}
    found = serve.load(argparse.Namespace(**models, lora=[f"{file}:0.5"]))
    assert [*found] == ["a", "a + ink", "b", "b + ink"]
    expected = lora_files.applied(folder, [f"{file}:0.5"]).params("unet")
    jax.tree.map(np.testing.assert_array_equal, found["b + ink"].pipeline.params["unet"], expected)
    jax.tree.map(np.testing.assert_array_equal, found["b"].pipeline.params["unet"], folder.params("unet"))
    with pytest.raises(ValueError, match=r"two models are called 'a \+ ink': name them, as --lora NAME=FILE"):
        serve.load(argparse.Namespace(**models, lora=[f"{file}:0.5", f"{file}:1"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--queue", "0"], "must be at least 1"),
        (["--model", "a/b=runs/small"], "give it a name"),
        (["--model", "x=", "--model", "x="], "two models are called 'x'"),
        (["--size", "big"], "is no size"),
        (["--queue", "5"], "--queue 5 has no room for the --most-pictures 10 of one request"),
        (["--lora", "ink="], "--lora ink=: give it a file, as --lora NAME=FILE"),
    ],
)
def test_mistakes_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    monkeypatch.setattr(serve.command, "keep_compiled_programs", lambda: None)
    with pytest.raises(SystemExit) as ended:
        serve.main(flags)
    assert message in f"{ended.value.code}{capsys.readouterr().err}"


def test_a_size():
    assert serve.size("512x768") == (512, 768)
    with pytest.raises(argparse.ArgumentTypeError):
        serve.size("512")
