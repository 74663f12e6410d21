"""The report is one file that shows what a workdir holds, with nothing to fetch."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from flaxkd import export, report, students
from flaxkd.pretrained import Folder
from flaxkd.students import picture
from flaxkd.training import metrics


class Page(HTMLParser):
    """Its headings, pictures, links and text; fails on a tag that is closed out of turn."""

    VOID = ("meta", "img", "input", "br", "hr", "path", "rect", "use", "image")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.headings, self.images, self.urls, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.urls += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.urls += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if "style" not in self.open and "script" not in self.open:
            self.text += data


@pytest.fixture
def workdir(tiny_pipeline, tmp_path, monkeypatch):
    """A workdir of sd_tiny as a training leaves it, after 20 of 40 steps."""
    monkeypatch.setattr(picture, "count", lambda part, config: 1_234_567)
    config = students.config(students.get("sd_tiny"), Folder.open(tiny_pipeline).config("unet"))
    workdir = tmp_path / "run"
    workdir.mkdir()
    run = dict(teacher=str(tiny_pipeline), student="sd_tiny", steps=40, batch_size=4, note="<b>&")
    (workdir / "config.json").write_text(json.dumps(run))
    export.write_record(workdir, Folder(tiny_pipeline), {"unet": config})
    metrics.note_start(workdir, command="python -m flaxkd.train --config 'a&b.py'", machine="1 x cpu")
    records = [
        {"step": 0, "validation/loss_output": 0.5, "validation/loss_feature": 8.0},
        {"step": 10, "loss": 1.0, "images_per_second": 12.0},
        {"step": 20, "validation/loss_output": 0.05, "validation/loss_feature": 2.0},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (workdir / "samples").mkdir()
    for step in range(20):
        Image.fromarray(np.full((30, 40, 3), 10 * step, np.uint8)).save(workdir / "samples" / f"{step:08}.png")
    Image.fromarray(np.zeros((10, 4000, 3), np.uint8)).save(workdir / "curves.png")
    return workdir


def test_everything_is_on_the_page_and_nothing_elsewhere(workdir):
    (workdir / "evaluation").mkdir()
    table = "| model | PSNR |\n|---|---:|\n| teacher | 100 |\n| mine | 21.5 |"
    (workdir / "evaluation" / "evaluation.md").write_text(f"# Evaluation\n\n{table}\n\n## Settings\n\nnone\n")
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(workdir / "evaluation" / "samples.png")
    (workdir / "bench").mkdir()
    (workdir / "bench" / "bench.md").write_text("# Benchmark\n\n| model | s |\n|---|---:|\n| mine | 0.123 |\n")
    out = report.write(workdir)
    assert out == workdir / "report.html" and [p.name for p in workdir.glob(".*")] == []
    text = out.read_text()
    page = Page(text)
    assert page.headings[0] == "sd_tiny, distilled from pipeline"
    assert page.headings[1:] == [
        "What was distilled from what", "Drawings over time", "Figures over time", "First and last figures",
        "Evaluation", "Benchmark", "Made by", "Configuration",
    ]  # fmt: skip
    assert all(url.startswith(("data:", "#")) for url in page.urls)
    assert not re.search(r"url\((?!#)|@import", text)
    for told in (
        "20 of 40",
        "80",
        "10.0%",
        "25.0%",
        "21.5",
        "0.123",
        "12.0",
        "--config 'a&b.py'",
        '"note": "<b>&"',
    ):
        assert told in page.text, told
    assert text.count("<svg") == 1
    assert any("a column per model" in image["alt"] for image in page.images)
    # On a phone: whatever is wide scrolls within the page, can be reached by keyboard, and says so.
    for wide in ("<table>", "<svg", "<img"):
        before = [text[: found.start()].rstrip() for found in re.finditer(wide, text)]
        assert before and all(re.search(r'class="wide" tabindex="0"[^>]*>$', start) for start in before), wide


def test_a_few_frames_stand_for_many_and_large_pictures_shrink(workdir):
    page = Page(report.write(workdir).read_text())
    images = []
    for attributes in page.images:
        data = base64.b64decode(attributes["src"].partition("base64,")[2])
        images.append(Image.open(io.BytesIO(data)))
        assert images[-1].size == (int(attributes["width"]), int(attributes["height"]))
        assert attributes["alt"]
    frames, curves = images[:-1], images[-1]
    assert len(frames) == report.FRAMES and curves.width == report.WIDEST
    levels = [image.convert("L").getpixel((5, 5)) for image in frames]
    assert levels == sorted(levels) and levels[0] < 5 and abs(levels[-1] - 190) < 5  # from first to newest


def test_a_run_without_a_student_has_no_picture_of_blocks(workdir, tiny_pipeline):
    run = json.loads((workdir / "config.json").read_text()) | {"student": None}
    (workdir / "config.json").write_text(json.dumps(run))
    export.write_record(workdir, Folder(tiny_pipeline), {"unet": Folder.open(tiny_pipeline).config("unet")})
    text = report.write(workdir).read_text()
    assert "<svg" not in text and "A text-to-image pipeline trained with flaxkd" in Page(text).headings


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no config\.json: give a workdir of flaxkd\.train"):
        report.main(["--workdir", str(tmp_path)])


def test_a_student_of_sdxl_from_a_file_has_its_name_and_its_blocks(tiny_xl, tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "count", lambda part, config: 1_234_567)
    row, file = students.get("bk_sdxl_small"), tmp_path / "mine.json"
    published = {"koala": students.Published("mine", "Mine")}
    students.write(students.Student(row.down, row.mid, row.up, published, ("sdxl",)), file)
    run = dict(teacher=str(tiny_xl), student=str(file), steps=40, batch_size=4)
    (tmp_path / "config.json").write_text(json.dumps(run))
    source = Folder.open(tiny_xl)
    export.write_record(tmp_path, source, {"unet": students.config(row, source.config("unet"))})
    text = report.page(tmp_path)
    assert Page(text).headings[0] == "mine, distilled from xl" and 'aria-label="blocks of the teacher' in text
