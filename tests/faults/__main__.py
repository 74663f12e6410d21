"""All faults, or those whose names have one of the words given, and a table of what happened.

python -m tests.faults [WORD ...]
"""

import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests import conftest as environment  # before JAX: a CPU, and compiled programs that are kept
from tests.faults.table import FAULTS
from tests.place import Impossible, Place


def main(words: list[str]) -> int:
    assert environment
    chosen = {name: row for name, row in FAULTS.items() if not words or any(word in name for word in words)}
    root, failed = Path(tempfile.mkdtemp(prefix="flaxkd-faults-")), 0
    place = Place(root)
    try:
        for name, row in chosen.items():
            begun = time.monotonic()
            try:
                happened = row.run(place) or "so it was"
            except Impossible as error:
                happened = f"not tried: {error}"
            except Exception as error:
                failed += 1
                happened = f"FAILED: {error}"
                traceback.print_exc()
            line = f"| {name} | {row.expected} | {happened} | {time.monotonic() - begun:.0f} s |"
            print(line.replace("\n", " "), flush=True)
    finally:
        place.close()
        shutil.rmtree(root, ignore_errors=True)
    print(f"{len(chosen)} faults, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
