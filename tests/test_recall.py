"""How many drawings have their own original among the nearest."""

import numpy as np
import pytest

from flaxkd import recall
from flaxkd.evaluate import originals as known


def test_recall_counts_originals_among_the_nearest():
    originals = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8) * 10
    drawn = originals[:3] + np.array([1, 18, 2], np.uint8)[:, None, None, None]  # the second is nearest to the fourth
    order = known.nearest(drawn, originals)
    assert order[:, 0].tolist() == [0, 3, 2]
    assert known.recall(order, 1) == pytest.approx(2 / 3)
    assert known.recall(order, 2) == pytest.approx(2 / 3)
    assert known.recall(order, 3) == pytest.approx(2 / 3)
    assert known.recall(order, 4) == 1.0


def test_a_model_of_another_size_is_refused_before_it_draws(tiny_pipeline):
    with pytest.raises(SystemExit, match="draws 32 x 32 pixels, and OpenMoji's originals have 64 x 64"):
        recall.main(["--model", str(tiny_pipeline), "--captions", "1", "--originals", "2"])
