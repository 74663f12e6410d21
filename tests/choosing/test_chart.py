import itertools
from types import SimpleNamespace

import numpy as np

from flaxkd.choosing import chart
from flaxkd.drawing import figures

# The outermost layers of the miniature: two pairs of nearly equal errors.
UNITS = {"0+1": 0.4473, "0+2": 1.015, "1+1": 0.4440, "1+2": 1.020}
ELSEWHERE = {"1+1": 0.1926, "all": 2e-7}


def test_labels_of_near_marks_do_not_touch(monkeypatch, tmp_path):
    units = [SimpleNamespace(place="down 0 and up 3", label=label) for label in UNITS]
    units += [SimpleNamespace(place="elsewhere", label=label) for label in ELSEWHERE]
    choice = SimpleNamespace(
        units=units,
        errors=np.array([*UNITS.values(), *ELSEWHERE.values()]),
        parameters=np.full(len(units), 115_552),
        fates=["kept"] * len(units),
        shares=(0.379, 0.61),
        measured=0.424,
        expected=0.637,
        student=SimpleNamespace(names=["chosen_38"]),
    )
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    chart.draw(choice, tmp_path / "chart.png")
    figure = drawn[0]
    figure.canvas.draw()
    for axis in figure.axes:
        boxes = [text.get_window_extent().padded(1) for text in axis.texts]  # 2 pixels between any two
        assert len(boxes) == len(units)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
