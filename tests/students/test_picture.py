"""The picture of the README shows what the table says."""

from PIL import Image

from flaxkd import students
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained.families import SD15
from flaxkd.students import TABLE, picture


def test_every_student_keeps_the_layers_of_its_row():
    for student in TABLE:
        kept = picture.kept(student)
        resnets = sum(map(len, (*student.down.values(), *student.up.values()))) + 2 * student.mid
        assert sum(".resnets." in module for module in kept) == resnets
        assert ("mid_block.attentions.0" in kept) == student.mid
        assert not [module for module in kept if module.startswith("up_blocks") and ".1" in module[11:]]
    tiny = picture.kept(students.get("sd_tiny"))
    assert "down_blocks.1.resample" in tiny and "down_blocks.2.resample" not in tiny


def test_what_is_compared_has_a_place_on_the_page():
    bars, outputs = picture.layout(UNetConfig.from_dict(SD15))
    assert [bar.left for bar in bars] == sorted(bar.left for bar in bars)
    for student in TABLE:
        compared = picture.comparisons(student)
        assert {module for pair in compared for module in pair[:2]} <= outputs.keys()
        for pairing in student.published:
            pairs = students.feature_pairs(student, pairing)
            assert sum(pairing in pair.pairings for pair in compared) == len(pairs)
    crooked = {pair for pair in picture.comparisons(students.get("sd_tiny")) if pair.here != pair.there}
    assert crooked == {
        ("down_blocks.2", "up_blocks.0", ("segmind",)),
        ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out", ("bksdm",)),
    }


def test_it_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "count", lambda part, config: 1_234_567)
    picture.draw(tmp_path / "blocks.png")
    with Image.open(tmp_path / "blocks.png") as image:
        width, height = image.size
        assert width > 2 * height > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 100
