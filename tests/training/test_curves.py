"""curves.png can be read: plain numbers at few ticks, nothing empty, for runs of one record and of many."""

import json

import numpy as np
import pytest

from flaxkd.drawing import figures
from flaxkd.training import curves


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """records -> {title: axis} of the picture, or None without one."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure))

    def draw(records):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        curves.draw(tmp_path)
        return {axis.get_title(): axis for axis in kept.pop().axes} if kept else None

    return draw


def ticks(of) -> list[str]:
    """The labels within the limits of an axis's x or y."""
    low, high = sorted(of.get_view_interval())
    places = [*of.get_major_locator()(), *of.get_minor_locator()()]
    return [of.get_major_formatter()(x) for x in places if low <= x <= high]


RANGES = [
    (5.2, 6.1),
    (0.08, 0.5),
    (0.02, 7),
    (1e-5, 1),
    (1e-30, 1e30),
    (0.25, 0.250001),
    (0, 1e-5),
    (-3, 4),
    (1e-5, 2e-5),
]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_an_axis_has_a_few_plain_numbers(drawn, low, high):
    found = drawn([{"step": 1000 * i, "loss": float(x)} for i, x in enumerate(np.linspace(low, high, 20))])
    labels = ticks(found["loss"].yaxis)
    assert 2 <= len(labels) <= 9 and len(set(labels)) == len(labels), labels
    assert all("$" not in label and "10^" not in label for label in labels), labels
    assert [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels]
    assert ticks(found["loss"].xaxis) == ["0", "5,000", "10,000", "15,000"]


def test_a_run_of_one_record_shows_a_dot(drawn):
    found = drawn([{"step": 0, "validation/loss": 0.5, "validation/feature/up_blocks.0": 0.1}])
    assert found.keys() == {"loss", "feature pairs"}
    for axis in found.values():
        assert [line.get_marker() for line in axis.lines] == ["o"]
        assert ticks(axis.xaxis) == ["\N{MINUS SIGN}1", "0", "1"]


def test_a_long_run_is_means_on_a_band_and_no_solid_bar(drawn):
    noise = np.random.default_rng(0).uniform(0.5, 1.5, 10_000)
    found = drawn([{"step": 10 * i, "loss": float(x), "feature/up_blocks.0": float(x)} for i, x in enumerate(noise)])
    (line,) = found["loss"].lines
    assert len(line.get_xdata()) == curves.POINTS and np.ptp(line.get_ydata()) < 0.5
    assert len(found["loss"].collections) == 1 and not found["feature pairs"].collections


def test_what_is_not_finite_is_left_out_and_no_panel_is_empty(drawn):
    nan = float("nan")
    records = [
        {"step": i, "loss": nan if i % 2 else 1.0 + i, "grad_norm": nan, "feature/up_blocks.0": nan} for i in range(9)
    ]
    found = drawn(records)
    assert found.keys() == {"loss"} and list(found["loss"].lines[0].get_xdata()) == [0, 2, 4, 6, 8]
    assert drawn([{"step": 0, "loss": nan}]) is None and drawn([]) is None


def test_a_slow_first_step_does_not_squash_the_rate(drawn):
    axis = drawn([{"step": i, "images_per_second": 0.1 if i == 0 else 40.0 + i % 3} for i in range(30)])["images/s"]
    assert axis.get_ylim()[0] == 0 and axis.get_ylim()[1] < 50 and axis.get_yscale() == "linear"
