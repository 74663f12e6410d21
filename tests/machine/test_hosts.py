"""Several processes on the loopback: one run, however many there are, whoever dies."""

import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from flaxkd.machine import sharding
from tests.running import EVERY, LONG, ROOT, STEPS, records

MANY = int(os.environ.get("FLAXKD_TEST_PROCESSES", 2))  # of which one dies


@pytest.fixture
def start(place):
    """(workdir, n) -> n started processes of one run, with a device each."""

    def processes(workdir, n):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"--coordinator_address=127.0.0.1:{probe.getsockname()[1]}"
        flags = [(address, f"--num_processes={n}", f"--process_id={i}") for i in range(n)] if n > 1 else [()]
        return [place.train(workdir, *of_process, **LONG) for of_process in flags]

    return processes


def last_step(workdir) -> int:
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def saved(workdir, step: int):
    return lambda: (workdir / "checkpoints" / str(step)).exists()


@pytest.mark.slow
def test_a_run_stopped_killed_and_resumed_by_other_numbers_of_processes_is_that_of_one(start, tmp_path):
    alone, workdir = tmp_path / "alone", tmp_path / "together"
    start(alone, 1)[0].end()

    two = start(workdir, 2)
    two[0].until(saved(workdir, EVERY), "first checkpoint")
    two[1].send(signal.SIGTERM)  # to one of them: all stop, at the same step
    outputs = [process.end(143) for process in two]
    stopped = last_step(workdir)
    assert all(f"stopped at step {stopped}; the same command resumes" in output for output in outputs)
    assert "SIGTERM" in outputs[1] and "SIGTERM" not in outputs[0]

    many = start(workdir, MANY)
    many[0].until(saved(workdir, (stopped // EVERY + 1) * EVERY), "next checkpoint")
    many[-1].send(signal.SIGKILL)
    outputs = [process.end(None, within=60) for process in many[:-1]]
    assert all(process.status not in (0, 143) for process in many)
    assert all("another one is gone" in output and "resume at the newest one" in output for output in outputs), outputs
    assert stopped < last_step(workdir) < STEPS

    output = start(workdir, 1)[0].end()
    assert "resuming at step" in output
    ours, theirs = records(workdir), records(alone)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]  # no step twice, none missing
    for mine, one in zip(ours, theirs, strict=True):
        assert mine.keys() == one.keys()
        names = [name for name in one if name != "images_per_second"]
        np.testing.assert_allclose([mine[k] for k in names], [one[k] for k in names], rtol=1e-4)


def test_processes_that_nobody_names_are_told_how_to_be_named():
    command = [sys.executable, "-m", "flaxkd.train", "--config=configs/small.py", "--distributed"]
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name and "OMPI" not in name}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "--coordinator_address HOST:PORT" in done.stderr and "Traceback" not in done.stderr


def test_arrays_are_put_where_they_belong_and_come_back():
    """On a mesh whose devices are in no order, as on a TPU."""
    devices = np.array(jax.devices())[[2, 0, 3, 1]].reshape(2, 2)
    mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    assert sharding.rows(mesh, 8).tolist() == list(range(8))  # one process has all devices
    batch = {"x": np.arange(24, dtype=np.float32).reshape(8, 3), "ids": np.arange(8)[:, None]}
    put = sharding.put_rows(batch, mesh, 8)
    wanted = jax.device_put(batch, sharding.batch(mesh))
    for name in batch:
        assert put[name].sharding == wanted[name].sharding
        np.testing.assert_array_equal(put[name], wanted[name])
    tree = {"large": np.arange(2**21, dtype=np.float32).reshape(2, -1), "scalar": np.float32(3)}
    shardings = sharding.params(mesh, tree)
    back = sharding.whole(sharding.put(tree, shardings), mesh)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
