"""What is printed when nobody reads it."""

import os
import subprocess
import sys

import pytest

from tests.running import ROOT

CODE = """
import sys
from pathlib import Path
from flaxkd.machine import command, streams
with command.reported(), streams.lasting():
    for i in range(3000):
        print("a line of text", i, flush=i % 7 == 0)
        print("a line of text", i, file=sys.stderr)
    Path(sys.argv[1]).write_text("done")
    raise ValueError("at last")
"""


@pytest.mark.parametrize("how", ["pipe", "closed", "full"])
def test_a_command_whose_output_nobody_reads_does_its_work(tmp_path, how):
    into = {"pipe": "2>&1 | head -n 1", "closed": ">&- 2>&-", "full": ">/dev/full 2>/dev/full"}[how]
    line = f"set -o pipefail; {sys.executable} -c '{CODE}' {tmp_path}/done {into}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "done").read_text() == "done" and done.returncode == 1


def test_letters_that_the_terminal_lacks_are_spelt_out(tmp_path):
    code = "from flaxkd.machine import command\nwith command.reported(): print('\\udcff \\u00fc')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "\\udcff \\xfc\n", done.stderr
