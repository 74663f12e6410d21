"""The quick rows of the table. `python -m tests.faults` has all of them."""

import pytest

from tests.faults.table import FAULTS
from tests.place import Impossible


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in FAULTS.items() if row.quick])
def test_fault(place, name):
    try:
        FAULTS[name].run(place)
    except Impossible as error:
        pytest.skip(str(error))
