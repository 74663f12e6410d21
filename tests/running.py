"""A run of flaxkd.train from outside: how it ended, and what it left in its workdir."""

import json
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent  # of the repository
STEPS, EVERY = 40, 10  # of a run of `command`, and between its checkpoints


def finish(process, code=0, timeout=600) -> str:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit status {process.returncode}\n{out}\n{err}"
    return out + err


def wait_for(path: Path, process, timeout=600) -> None:
    end = time.time() + timeout
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.002)


def state(workdir: Path, step: int = STEPS):
    """What a checkpoint holds, as numpy arrays."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((workdir / "checkpoints" / str(step) / "state").absolute())


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_bits(a, b):
    import jax

    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    different = [jax.tree_util.keystr(path) for (path, x), y in pairs if not np.array_equal(x, y)]
    assert not different, f"{len(different)} leaves differ: {different[:5]}"
