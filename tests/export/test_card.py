"""The card of an export tells what it is, and under which licence."""

import json
import shutil

import pytest

from flaxkd import export, students
from flaxkd.export import card
from flaxkd.pretrained import Folder, hub
from flaxkd.pretrained.families import SD15, SDXL


def test_the_card_tells_what_it_is(workdir, tmp_path):
    out = export.export(workdir, tmp_path / "out")
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    for line in (
        "license: other",
        "library_name: diffusers",
        "base_model: owner/teacher",
        "- knowledge-distillation",
    ):
        assert line in front.splitlines()
    assert "`bk_tiny`" in body and "![samples](samples.png)" in body and "20 optimizer steps" in body
    assert "| validation/loss | 2 | 0.25 | 20 |" in body and "mid_block |" not in body
    assert "CC BY-SA 4.0" in body and "moving average" in body and "32 x 32 pixels" in body
    assert (out / "samples.png").read_bytes() == b"picture"


def test_the_card_of_a_student_of_the_embedded_teacher(workdir, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED", tiny_pipeline)
    run = json.loads((workdir / "config.json").read_text()) | {"teacher": None}
    (workdir / "config.json").write_text(json.dumps(run))
    export.write_record(workdir, Folder.open(tiny_pipeline), json.loads((workdir / "export.json").read_text())["parts"])
    assert json.loads((workdir / "export.json").read_text())["source"] is None
    front = (export.export(workdir, tmp_path / "out") / "README.md").read_text().split("---\n")[1]
    assert "license: cc-by-sa-4.0" in front and "base_model" not in front


@pytest.mark.parametrize(
    "theirs, data, ours",
    [("mit", "pictures", "mit"), ("mit", "openmoji", "other"), ("cc-by-sa-4.0", "openmoji", "cc-by-sa-4.0")],
)
def test_the_licence_of_the_source_goes_on(workdir, tiny_pipeline, tmp_path, theirs, data, ours):
    source = shutil.copytree(tiny_pipeline, tmp_path / "mine" / "diffusers")
    (source / "README.md").write_text(f"---\nlicense: {theirs}\n---\nlicense: none of these\n")
    run = json.loads((workdir / "config.json").read_text()) | {
        "teacher": str(source),
        "data": {"source": data},
    }
    (workdir / "config.json").write_text(json.dumps(run))
    out = export.export(workdir, tmp_path / "out", source=source)
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert f"license: {ours}" in front.splitlines()
    assert f"derive from those of mine, whose licence ({theirs})" in body


def test_the_card_of_a_student_of_sdxl_states_its_depths():
    """Programs that know SDXL alone build other layers, some without a word."""
    depths = {name: card.depths(students.config(students.get(name), SDXL)) for name in ("ssd_1b", "koala_700m")}
    assert depths["ssd_1b"] == (
        "Transformer blocks of each layer, `-` for a layer without attention: down - -, 2 2, 4 4; mid none; "
        "up 4 4 10, 2 1 1, - - -. It needs diffusers 0.22 or newer: older versions build other layers."
    )
    assert depths["koala_700m"].endswith("down -, 2, 5; mid none; up 5 5, 2 2, - -.")
    assert card.depths(SDXL).endswith("down - -, 2 2, 10 10; mid 10; up 10 10 10, 2 2 2, - - -.")
    assert card.depths(SD15) == ""
