"""Two caches as one: their examples in turn, the smaller one over again, from any position and for any process."""

import numpy as np
import pytest

from flaxkd.data import loader


class Half:
    """A reader of n numbers, in order."""

    def __init__(self, first: int, n: int, size=(4, 4, 8)):
        self.numbers, self.size = np.arange(first, first + n), size

    def sizes(self):
        return {self.size}

    def examples(self, n):
        return [{"x": self.numbers[:n]}]

    def batches(self, batch_size, seed, flip=None):
        numbers = self.numbers

        class Position:
            at = 0

            def __next__(self):
                chosen = numbers[np.arange(self.at, self.at + batch_size) % len(numbers)]
                self.at += batch_size
                return {"x": chosen}

            def get_state(self):
                return {"at": self.at}

            def set_state(self, state):
                self.at = state["at"]

        return Position()


def test_examples_are_in_turn_and_the_position_is_that_of_both():
    pairs = loader.Pairs(Half(0, 3), Half(100, 5))
    batches = pairs.batches(4, seed=0)
    assert next(batches)["x"].tolist() == [0, 100, 1, 101]
    position = batches.get_state()
    second = next(batches)["x"].tolist()
    assert second == [2, 102, 0, 103]
    mine = pairs.batches(4, seed=0, rows=[2, 3])
    mine.set_state(position)
    assert next(mine)["x"].tolist() == second[2:]
    assert pairs.examples(8)[0]["x"].tolist() == [0, 100, 1, 101, 2, 102, 0, 103]


def test_pictures_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="squares alone"):
        loader.Pairs(Half(0, 3), Half(0, 3, (4, 6, 8)))
