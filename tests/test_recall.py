"""How many drawings have their own original among the nearest."""

import numpy as np
import pytest

from flaxkd import recall


def test_recall_counts_originals_among_the_nearest():
    originals = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8) * 10
    drawn = originals[:3] + np.array([1, 18, 2], np.uint8)[:, None, None, None]  # the second is nearest to the fourth
    order = recall.nearest(drawn, originals)
    assert order[:, 0].tolist() == [0, 3, 2]
    assert recall.recall(order, 1) == pytest.approx(2 / 3)
    assert recall.recall(order, 2) == pytest.approx(2 / 3)
    assert recall.recall(order, 3) == pytest.approx(2 / 3)
    assert recall.recall(order, 4) == 1.0
