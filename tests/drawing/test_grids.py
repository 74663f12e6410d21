import numpy as np
import pytest
from PIL import Image, ImageDraw

from flaxkd.drawing import grids


def test_a_title_that_is_too_long_keeps_its_end_within_its_column(tmp_path):
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), grids.font(14)
    long = "/home/somebody/runs/small-sd15/diffusers"
    cut = grids.end_of(draw, long, grids.TITLE, font)
    assert draw.textlength(cut, font) <= grids.TITLE < draw.textlength(f"/{cut}", font) + 8
    assert cut[0] == "…" and long.endswith(cut[1:])
    for usual in ("teacher", "student as begun", "student, distilled", "the embedded teacher"):
        assert grids.end_of(draw, usual, grids.TITLE, font) == usual

    columns = {"teacher": np.zeros((1, 64, 64, 3), np.uint8), long: np.zeros((1, 64, 64, 3), np.uint8)}
    grids.grid(columns, ["red apple"], tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as sheet:
        heads = np.asarray(sheet.convert("L"))[: grids.MARGIN + 22]
    ink = np.flatnonzero((heads < 128).any(0))
    assert ink.max() < heads.shape[1] - grids.MARGIN  # nothing beyond the last column
    gap = np.flatnonzero(np.diff(ink) > grids.GAP)
    assert gap.size == 1  # and a space between the two titles


def test_narrow_pictures_stand_in_columns_as_wide_as_their_titles(tmp_path):
    black = np.zeros((2, 64, 64, 3), np.uint8)
    grids.grid({"runs/collages": black, "red": black}, ["red apple", "blue heart"], tmp_path / "grid.png", scale=1)
    with Image.open(tmp_path / "grid.png") as sheet:
        ink = np.asarray(sheet.convert("L")) < 128
    left = grids.MARGIN + 190  # of the first column
    width = np.ceil(grids.font(14).getlength("runs/collages"))
    assert 64 < width < grids.TITLE and ink.shape[1] == left + 2 * (width + grids.GAP) + grids.MARGIN
    pictures = np.flatnonzero(ink[-grids.MARGIN - grids.GAP - 32])
    pictures = pictures[pictures >= left]
    assert pictures.size == 128  # both, and their middles are those of their columns
    assert pictures.reshape(2, 64).mean(1) == pytest.approx([left + width / 2, left + grids.GAP + 1.5 * width], abs=1.0)


@pytest.mark.parametrize("text, lines", [("red apple", 1), ("person in motorized wheelchair", 2)])
def test_a_prompt_is_wrapped(text, lines):
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), grids.font(13)
    wrapped = grids.wrap(draw, text, 150, font)
    assert wrapped.count("\n") == lines - 1 and wrapped.split() == text.split()


@pytest.mark.parametrize(
    ("text", "most", "lines"),
    [
        ("word " * 40, 4, 4),  # cut, and said so
        ("Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen", None, 3),
        ("一只红色的苹果放在木桌上旁边还有一杯茶和一本书" * 3, 3, 3),
        ("", 3, 1),
    ],
)
def test_a_long_prompt_stays_within_its_row(text, most, lines):
    draw, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), grids.font(13)
    wrapped = grids.wrap(draw, text, 150, font, most)
    assert wrapped.count("\n") == lines - 1
    assert all(draw.textlength(line, font) <= 150 for line in wrapped.split("\n"))
    assert wrapped.endswith("…") == (len(wrapped) < len(text.strip()))


def test_letters_of_any_script_are_drawn(tmp_path):
    """Those of DejaVu Sans as they are, others as boxes, and halves of a pair as question marks."""
    font = grids.font(13)
    marks = {font.getmask(letter).getbbox() and bytes(font.getmask(letter)) for letter in "äřЯλ"}
    assert len(marks) == 4  # not four equal boxes
    columns = {"Яблоко \udcff": np.zeros((3, 64, 64, 3), np.uint8)}
    rows = ["červené jablko", "红苹果 🍎", "nom\udce9 de fichier"]
    grids.grid(columns, rows, tmp_path / "grid.png", info={"prompt": "\n".join(rows)})
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.text["prompt"] == "červené jablko\n红苹果 🍎\nnom? de fichier"
