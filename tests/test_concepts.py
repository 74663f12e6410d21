"""The table of concepts: which models draw, how often, and what is written."""

import json

import pytest
from PIL import Image

from flaxkd import concepts
from flaxkd.evaluate import concepts as known

CAPTIONS = ["red heart", "blue circle", "pink heart", "green hexagon", "star"]
CAPTIONS += [f"{color} square" for color in known.COLORS]


@pytest.fixture
def drawn(monkeypatch):
    """What the models are asked for: the teacher always draws a red heart, the other one what the prompt says."""
    asked = []

    class Named:
        def __init__(self, model):
            self.name = model or "teacher"

    def draw(pipeline, prompts, seed, **options):
        asked.append((pipeline.name, len(prompts), seed, options["num_inference_steps"]))
        originals = known.originals()
        words = ["red heart" if pipeline.name == "teacher" else prompt for prompt in prompts]
        numbers = {" ".join(concept): i for i, concept in enumerate(originals.concepts)}
        return originals.pictures[[numbers.get(text, 0) for text in words]]

    monkeypatch.setattr(concepts.Pipeline, "from_pretrained", Named)
    monkeypatch.setattr(concepts.same_noise, "draw", draw)
    monkeypatch.setattr(known, "training_captions", lambda: CAPTIONS)
    return asked


def test_every_model_is_asked_for_every_prompt_and_gets_its_rows(drawn, tmp_path, capsys):
    out = tmp_path / "concepts"
    concepts.main(["--model", "other", "--pictures", "2", "--seed", "5", "--steps", "3", "--out", str(out)])
    written = json.loads((out / "concepts.json").read_text())
    n = len(written["prompts"])
    assert drawn == [("teacher", 2 * n, 5, 3), ("other", 2 * n, 5, 3)]
    rows = {(row["model"], row["kind"]): row for row in written["rows"]}
    assert len(rows) == 6 and rows["teacher", "seen"]["pictures"] == 2 * 12
    assert rows["teacher", "seen"]["all"] == pytest.approx(1 / 12) == rows["teacher", "seen"]["chance"]["all"]
    assert rows["other", "seen"]["all"] == rows["other", "novel"]["all"] == 1
    assert "| other | seen | 24 | 100 ± 0" in (out / "concepts.md").read_text()
    with Image.open(out / "concepts.png") as sheet:
        assert sheet.width > 2 * 64 and sheet.height > 10 * 64
    with pytest.raises(SystemExit, match="--pictures is 0, must be at least 1"):
        concepts.main(["--pictures", "0"])
