"""The picture of the README shows what the table says."""

import pytest
from PIL import Image

from flaxkd import blocks, students
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained.families import ARCHITECTURES, FAMILIES, SD15, SDXL
from flaxkd.students import TABLE, picture


def test_every_student_keeps_the_layers_of_its_row():
    for student in students.of(FAMILIES["sd1"]):
        kept = picture.kept(student, SD15)
        resnets = sum(map(len, (*student.down.values(), *student.up.values()))) + 2 * student.mid
        assert sum(".resnets." in module for module in kept) == resnets
        assert ("mid_block.attentions.0" in kept) == student.mid
        assert not [module for module in kept if module.startswith("up_blocks") and ".1" in module[11:]]
    tiny = picture.kept(students.get("sd_tiny"), SD15)
    assert "down_blocks.1.downsamplers.0" in tiny and "down_blocks.2.downsamplers.0" not in tiny
    ssd_1b = picture.kept(students.get("ssd_1b"), SDXL)
    blocks = [i for i in range(10) if f"up_blocks.0.attentions.1.transformer_blocks.{i}" in ssd_1b]
    assert blocks == [0, 1, 2, 6]
    assert [module for module in sorted(ssd_1b) if "mid" in module] == ["mid_block", "mid_block.resnets.0"]


def test_what_is_compared_has_a_place_on_the_page():
    for student in TABLE:
        teacher = ARCHITECTURES[student.family.shown].unet
        bars, outputs = picture.layout(UNetConfig.from_dict(teacher))
        assert [bar.left for bar in bars] == sorted(bar.left for bar in bars)
        compared = picture.comparisons(student, teacher)
        assert {module for pair in compared for module in pair[:2]} <= outputs.keys()
        for pairing in student.published:
            pairs = students.feature_pairs(student, pairing, teacher)
            assert sum(pairing in pair.pairings for pair in compared) == len(pairs)
    crooked = {pair for pair in picture.comparisons(students.get("sd_tiny"), SD15) if pair.here != pair.there}
    assert crooked == {
        ("down_blocks.2", "up_blocks.0", ("segmind",)),
        ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out", ("bksdm",)),
    }


@pytest.mark.parametrize("teacher, ratio", [("sd15", 2), ("sdxl", 1)])
def test_it_can_be_drawn(teacher, ratio, tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "count", lambda part, config: 1_234_567)
    blocks.main(["--teacher", teacher, "--out", str(tmp_path / "blocks.png")])
    with Image.open(tmp_path / "blocks.png") as image:
        width, height = image.size
        assert width > ratio * height > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100
