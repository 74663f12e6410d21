"""The quick rows of the table. `python -m tests.faults` has all of them."""

import pytest

from tests.faults.place import Impossible, Place
from tests.faults.table import FAULTS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = Place(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


@pytest.mark.parametrize("name", [name for name, row in FAULTS.items() if row.quick])
def test_fault(place, name):
    try:
        FAULTS[name].run(place)
    except Impossible as error:
        pytest.skip(str(error))
