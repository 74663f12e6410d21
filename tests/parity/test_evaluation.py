"""The published protocol from end to end, with stand-ins for its large networks."""

import json

import pytest

from flaxkd.drawing import batches
from flaxkd.evaluate import scores
from flaxkd.evaluate.__main__ import main
from tests.evaluate.test_evaluation import FEW, furnish
from tests.tiny import CAPTIONS

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def home(tiny_pipeline, tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"), tiny_pipeline)


def test_the_published_protocol(home, tiny_pipeline, clip_folder, inception, monkeypatch):
    monkeypatch.setattr(scores, "load_inception", lambda weights: inception)
    monkeypatch.setattr(scores, "SIZE", 32)  # the tiny pipeline draws no larger
    (home / "prompts.txt").write_text("\n".join(f"{CAPTIONS[i % 5]} {i}" for i in range(30)))
    arguments = ["--no-fidelity", "--model", str(home / "student"), "--reference", str(tiny_pipeline), *FEW]
    arguments += ["--prompts", str(home / "prompts.txt"), "--limit=20", "--clip", str(clip_folder)]
    out = home / "protocol"
    main([*arguments, "--real", str(home / "pictures"), "--out", str(out)])
    result = json.loads((out / "evaluation.json").read_text())
    assert [row["model"] for row in result["rows"]] == ["teacher (pipeline)", "student"]
    for row in result["rows"]:
        assert row["fid"] > 0 and row["inception_score"] >= 1 and -1 < row["clip_score"] < 1
    assert "prompts 20 instead of 30000" in result["notes"][0] and "sampler ddim instead of pndm" in result["notes"][0]
    assert result["settings"]["prompts"].startswith("20 of ") and (out / "real.npz").is_file()

    def nothing(*_, **__):
        raise AssertionError("drawn again")

    monkeypatch.setattr(batches, "draw", nothing)
    main([*arguments, "--real", str(out / "real.npz"), "--out", str(out)])  # all pictures are there
    again = json.loads((out / "evaluation.json").read_text())
    assert again["rows"] == result["rows"]
