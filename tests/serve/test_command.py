"""`python -m flaxkd.serve`: what it refuses before anything is loaded."""

import argparse

import pytest

from flaxkd.serve import __main__ as serve


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("runs/small", ("small", "runs/small")),
        ("small=runs/other", ("small", "runs/other")),
        ("teacher=", ("teacher", None)),
        ("sd 1.5=owner/name", ("sd 1.5", "owner/name")),
        ("models/dream.safetensors", ("dream", "models/dream.safetensors")),
        ("ink=files/ink.safetensors:0.8", ("ink", "files/ink.safetensors:0.8")),
    ],
)
def test_a_model_has_a_name(typed, expected):
    assert serve.named(typed) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--queue", "0"], "must be at least 1"),
        (["--model", "a/b=runs/small"], "give it a name"),
        (["--model", "x=", "--model", "x="], "two models are called 'x'"),
        (["--size", "big"], "is no size"),
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
