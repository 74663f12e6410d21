"""Processes that work together, usually one on each host: how they find each other, wait, agree and end.

For a single process, all of this does nothing. sharding.py says what they compute together, and which device holds
what.
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

from flaxkd.machine import gathering

HEARTBEAT = 30  # seconds of silence, after which a process counts as dead and all others end
ARRIVAL = 300  # seconds, within which all processes start
PULSE = 5  # seconds between two checks that all are alive
PATIENCE = 24 * 3600  # seconds to wait for the work of a live process, such as encoding or an upload

# Words in the errors of a collective or the coordinator when the other side of a connection is gone.
GONE = ("Gloo", "NCCL", "coordination service", "CoordinationService", "heartbeat", "Socket closed")

# {flag of a command: its type and meaning}, for absl and argparse.
FLAGS = {
    "distributed": (bool, "this is one of several processes; SLURM, Open MPI, GKE or the TPU VM says which"),
    "coordinator_address": (str, "HOST:PORT of process 0, with any free port, if no cluster provides it"),
    "num_processes": (int, "number of processes, if no cluster provides it"),
    "process_id": (int, "number of this process, counted from 0, if no cluster provides it"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `together` to a parser."""
    group = parser.add_argument_group("several processes")
    for name, (kind, meaning) in FLAGS.items():
        options = {"action": "store_true"} if kind is bool else {"type": kind}
        group.add_argument(f"--{name.replace('_', '-')}", help=meaning, **options)


def is_first() -> bool:
    """Whether this process writes what is written once: figures, pictures, the export."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all processes are here. name: of the place; a run uses each name once."""
    _barrier()(key=f"flaxkd {name}", timeout_ms=PATIENCE * 1000)


def any_of(flag: bool) -> bool:
    """Whether `flag` is true for any process. All processes must call this. It waits for the device."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def same(value: int) -> bool:
    """Whether `value` is equal for all processes. All processes must call this."""
    return bool(np.all(multihost_utils.process_allgather(np.array(value)) == value))


@contextlib.contextmanager
def together(flags) -> Iterator[None]:
    """In this context, the processes of all hosts are one program. Enter it before any use of JAX.

    flags: has the attributes of FLAGS. If one process ends early, for any reason, the others end within a minute,
    with a message and a nonzero status."""
    given = {name: getattr(flags, name) for name in FLAGS if name != "distributed"}
    if not flags.distributed and all(value is None for value in given.values()):
        yield
        return
    connect(**given)
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), daemon=True).start()
    try:
        yield
        wait("end")  # for the export, written by the first process alone
    except BaseException as error:
        leave(error)
    over.set()
    jax.distributed.shutdown()


def connect(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Finds the other processes. For None, JAX asks SLURM, Open MPI, GKE or the TPU VM.

    If that is not enough, or the others do not appear within 5 minutes, this process ends with a message."""
    # JAX ends a process that waited too long by an abort in C++, without a word on who is missing.
    late = threading.Timer(ARRIVAL + 10, lambda: leave(_lost(f"not all came within {ARRIVAL} seconds.")))
    late.daemon = True
    late.start()
    try:
        if None not in (coordinator_address, num_processes, process_id):
            gathering.gather(coordinator_address, num_processes, process_id, ARRIVAL)
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=ARRIVAL + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise _lost(error) from error
    finally:
        late.cancel()
    # JAX takes SIGTERM for its own protocol and would lose a signal before the first step.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _lost(reason) -> SystemExit:
    return SystemExit(
        f"error: the processes cannot find each other: {reason} If this is no SLURM, Open MPI, GKE or TPU VM, give "
        "each --coordinator_address HOST:PORT (of process 0), --num_processes N and --process_id 0 to N - 1."
    )


@functools.cache
def _barrier():
    """A barrier over the network of the hosts. JAX's own barrier runs on their devices, and would time out."""
    return ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))


def _watch(over: threading.Event) -> None:
    """Ends this process when another one is dead: it may be waiting for that one on the device, forever.

    JAX would end it too, but without a message a person understands."""
    while not over.is_set():
        if is_first():  # the others wait for it, and learn at once that one is gone
            over.wait(PULSE)
        try:
            _barrier()(key="flaxkd alive", timeout_ms=PATIENCE * 1000)
        except Exception as error:
            if not over.is_set():
                leave(error)


def leave(error: BaseException) -> None:
    """Reports the error and ends this process at once. In an orderly end, processes wait for each other."""
    code = error.code if isinstance(error, SystemExit) else None
    text = "" if isinstance(code, int) else str(error)
    if any(word in text for word in GONE):
        text = (
            f"error: process {jax.process_index()} of {jax.process_count()} ends, since another one is gone; the log "
            "of that one says why. Checkpoints are whole: the same commands resume at the newest one, with this or "
            f"another number of processes. ({text.splitlines()[0]})"
        )
    elif code is None:
        text = "".join(traceback.format_exception(error))
    try:
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)
    finally:  # even if nobody reads the output any more
        os._exit(code if isinstance(code, int) and code else 1)
