"""Processes that work together, usually one on each host: how they find each other, wait, agree and end.

One process alone is the case n = 1, in which all of this does nothing. What they compute together, and who holds what
of it, is in sharding.py.
"""

import argparse
import contextlib
import functools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

HEARTBEAT = 30  # seconds without a sign of life, after which a process counts as dead and all others end
PULSE = 5  # seconds between two looks whether all are alive
PATIENCE = 24 * 3600  # seconds to wait for the work of a process that lives, such as encoding or an upload

# Words of the errors that a collective or the coordinator raises when the other side of a connection is gone.
GONE = ("Gloo", "NCCL", "coordination service", "CoordinationService", "heartbeat", "Socket closed")

# {flag of a command: its type and meaning}, for absl and argparse.
FLAGS = {
    "distributed": (bool, "one of several processes; SLURM, Open MPI, GKE and TPU VMs say which"),
    "coordinator_address": (str, "HOST:PORT of process 0, where no cluster says it; any free port"),
    "num_processes": (int, "how many processes there are, where no cluster says it"),
    "process_id": (int, "which of them this one is, from 0, where no cluster says it"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same flags for a command that uses argparse."""
    group = parser.add_argument_group("several processes")
    for name, (kind, meaning) in FLAGS.items():
        options = {"action": "store_true"} if kind is bool else {"type": kind}
        group.add_argument(f"--{name.replace('_', '-')}", help=meaning, **options)


def is_first() -> bool:
    """Whether this process is the one that writes what there is once: figures, pictures, the export."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when all processes have come here. name: of the place, each used once in a run."""
    _barrier()(key=f"flaxkd {name}", timeout_ms=PATIENCE * 1000)


def any_of(flag: bool) -> bool:
    """Whether `flag` is true for any process; all have to ask. It waits for the device."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def same(value: int) -> bool:
    """Whether `value` is equal for all processes; all have to ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value)) == value))


@contextlib.contextmanager
def together(flags) -> Iterator[None]:
    """Within it, the processes of all hosts are one program. Nothing of JAX may be used before.

    flags: has the attributes of FLAGS. If one process ends early, for whatever reason, so do the others within a
    minute, with a message and a status that is not 0."""
    given = {name: getattr(flags, name) for name in FLAGS if name != "distributed"}
    if not flags.distributed and all(value is None for value in given.values()):
        yield
        return
    connect(**given)
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), daemon=True).start()
    try:
        yield
        wait("end")  # for the export, which the first process alone writes
    except BaseException as error:
        _leave(error)
    over.set()
    jax.distributed.shutdown()


def connect(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Finds the other processes. What is None, JAX takes from SLURM, Open MPI, GKE or the TPU VM.

    If that is not enough, or the others are not there within 5 minutes, this process ends with a message."""
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        sys.exit(
            f"error: the processes cannot find each other: {error} If this is no SLURM, Open MPI, GKE or TPU VM, give "
            "each --coordinator_address HOST:PORT (of process 0), --num_processes N and --process_id 0 to N - 1."
        )
    # JAX keeps SIGTERM for its own protocol, in which a signal before the first step would be lost.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@functools.cache
def _barrier():
    """A wait over the network of the hosts and not, as JAX's own, on their devices, which would time out."""
    return ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))


def _watch(over: threading.Event) -> None:
    """Ends this process when another one is dead: it may be waiting for that one on the device, forever.

    JAX would end it too, but without a word that a person understands."""
    while not over.is_set():
        if is_first():  # the others wait for it, and so hear at once that one is gone
            over.wait(PULSE)
        try:
            _barrier()(key="flaxkd alive", timeout_ms=PATIENCE * 1000)
        except Exception as error:
            if not over.is_set():
                _leave(error)


def _leave(error: BaseException) -> None:
    """Tells of the error and ends this process at once. An orderly end would wait for the others, which wait for it."""
    code = error.code if isinstance(error, SystemExit) else None
    text = str(error)
    if any(word in text for word in GONE):
        text = (
            f"error: process {jax.process_index()} of {jax.process_count()} ends, since another one is gone; the log "
            "of that one says why. Checkpoints are whole: the same commands go on from the newest one, with this or "
            f"another number of processes. ({text.splitlines()[0]})"
        )
    elif code is None:
        text = "".join(traceback.format_exception(error))
    try:
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)
    finally:  # even if nobody reads the output any more
        os._exit(code if isinstance(code, int) and code else 1)
