"""What a TPU program will hold and send, known a minute into its compilation, which may take half an hour more.

XLA decides where every buffer lies before it writes machine code. Here a process of its own compiles with XLA's dumps
turned on, and is ended as soon as that decision is in them. What it cannot tell are the bytes of the machine code.
"""

import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flaxkd import ahead, devices

DUMPS = "--xla_dump_to={} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"
# Of the dumps, in the order in which they are written. What the last one says is not needed, but that it is there.
PROGRAM, BUFFERS, MEMORY, LAST = (
    f"*after_optimizations{rest}.txt"
    for rest in ("", "-buffer-assignment", "-memory-usage-report", "_after_buffer_assignment")
)
TOTAL = r"\(color=0\)\s+Total bytes: (\d+)"  # color 0 is the memory of the device, others are on its chip
TEMPORARY = r"^allocation \d+: size (\d+), preallocated-temp"


def assigned(config, lowered: ahead.Lowered, target: devices.Target) -> ahead.Compiled:
    """Of the step of `config` for a TPU; `lowered` is the same step, which the other process lowers again.

    Where no such dumps are written, it takes as long as `ahead.whole`, and tells as much.
    Raises RuntimeError with what the compiler said if that is not that the program is too large."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="flaxkd-plan-") as scratch:
        folder = Path(scratch)
        (folder / "job").write_bytes(pickle.dumps((config, target)))
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DUMPS.format(folder)}",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with (folder / "said").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "flaxkd.early", scratch], env=environment, stdout=said, stderr=said
            )
        try:
            while process.poll() is None and not any(folder.glob(LAST)):
                time.sleep(0.2)
            ended = process.poll()
        finally:
            process.kill()
            process.wait()
        if any(folder.glob(LAST)):
            return read(folder, time.perf_counter() - begin)
        if ended == 0:
            return pickle.loads((folder / "result").read_bytes())
        last = "\n".join((folder / "said").read_text().splitlines()[-5:])
        raise RuntimeError(f"the compiler for {target.name} ended with status {ended}:\n{last}")


def read(folder: Path, seconds: float) -> ahead.Compiled:
    """What XLA's dumps say of one program, all bytes on one device."""
    text = lambda pattern: next(folder.glob(pattern)).read_text()
    needed = int(re.search(TOTAL, text(MEMORY))[1])
    temporary = sum(map(int, re.findall(TEMPORARY, text(BUFFERS), re.MULTILINE)))
    return ahead.Compiled(needed, temporary, None, ahead.collectives(text(PROGRAM)), seconds)


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")
    here = Path(sys.argv[1])
    job = pickle.loads((here / "job").read_bytes())
    (here / "result").write_bytes(pickle.dumps(ahead.whole(job[0], ahead.lower(*job), job[1])))
