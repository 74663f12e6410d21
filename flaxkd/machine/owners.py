"""Which process a file or folder belongs to: locks, and names of unfinished files that tell whether their maker lives.

A folder has one writer at a time. The lock is a file in it that names its holder. Where the file system knows flock,
the lock ends with the process, however that dies. Another host sees a living holder by the time of the file, which it
renews every few seconds.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LOCK = ".lock"
PULSE = 5  # seconds between two signs of life of a holder
PATIENCE = 3 * PULSE  # seconds without one, after which a holder on another host counts as dead
DAY = 24 * 3600


class Held(OSError):
    """Another living process works in the folder."""


class Owner(NamedTuple):
    """A process, told apart from all others of all hosts. started: in ticks since boot; 0 where /proc is missing."""

    machine: str  # of host name and boot
    pid: int
    started: int

    @property
    def alive(self) -> bool | None:
        """Whether it runs; None for a process of another machine."""
        if self.machine != machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's process
        return started(self.pid) == self.started  # else the number was given to another process


@functools.cache
def machine() -> str:
    """Eight letters for this host since its last boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        boot = ""
    return hashlib.sha256(f"{socket.gethostname()} {boot}".encode(errors="replace")).hexdigest()[:8]


def started(pid: int) -> int:
    """Start of a process in ticks since boot; 0 if unknown, -1 if it is dead already and only its parent's to end."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in "ZX" else int(fields[19])


def this() -> Owner:
    return Owner(machine(), os.getpid(), started(os.getpid()))


# -- Unfinished files ------------------------------------------------------------------------------------------------

UNFINISHED = re.compile(r"^\..*\.([0-9a-f]{8})-(\d+)-(\d+)\.[0-9a-f]{8}$", re.DOTALL)


def unfinished(name: str) -> str:
    """A new hidden name for what will be called `name`; it says who writes it. It is never too long for a folder."""
    return f".{name[:40]}.{'-'.join(map(str, this()))}.{uuid.uuid4().hex[:8]}"


def abandoned(name: str, age: float) -> bool:
    """Whether a file of this name, `age` seconds old, is unfinished and of a process that is dead. Of another machine
    nobody knows that, so its files count as such after a day."""
    if not (match := UNFINISHED.match(name)):
        return False
    alive = Owner(match[1], int(match[2]), int(match[3])).alive
    return age > DAY if alive is None else not alive


# -- Locks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def alone(folder: os.PathLike, work: str) -> Iterator[None]:
    """In this context, no other process is `alone` with `folder`, an existing one on this machine or shared by several.

    work: what goes on, e.g. "a training". The lock of a dead process is taken over. Raises Held, with process, host
    and time, if its holder lives."""
    path = Path(folder) / LOCK
    file = _take(path, work)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(file, over), daemon=True)
    beat.start()
    try:
        yield
    finally:
        over.set()
        beat.join()
        with contextlib.suppress(OSError):  # a disk that was lost meanwhile
            if _same(path, file):
                path.unlink()
        os.close(file)


def _take(path: Path, work: str) -> int:
    """The open lock file, now ours."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            free = _flock(file)
            holder = _read(file)
            if free is False or (holder and _lives(path, holder, bool(free))):
                raise Held(_refusal(path, holder))
            if not _same(path, file):  # the holder has removed it since
                os.close(file)
                continue
            facts = {"work": work, "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            with contextlib.suppress(OSError):  # on a full disk it has no name; what comes next says that it is full
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(facts | {"owner": this()}).encode(), 0)
            return file
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(file)
            raise


def _flock(file: int) -> bool | None:
    """Whether the lock is ours now; None if this file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _read(file: int) -> dict | None:
    """What the holder has written; None for a lock that nobody holds."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        holder = json.loads(os.pread(file, 4096, 0))
        return holder | {"owner": Owner(*holder["owner"])}
    return None


def _lives(path: Path, holder: dict, free: bool) -> bool:
    """Whether the holder lives. free: its lock could be taken, which says nothing of another machine."""
    alive = holder["owner"].alive
    if alive is not None:
        return alive and not free
    first, end = _time_of(path), time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(PULSE / 5)
        if _time_of(path) != first:
            return True
    return False


def _time_of(path: Path) -> int:
    """When the holder last wrote. The file is opened, since a network file system then asks its server."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return 0


def _beat(file: int, over: threading.Event) -> None:
    while not over.wait(PULSE):
        with contextlib.suppress(OSError):
            os.utime(file)


def _same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _refusal(path: Path, holder: dict | None) -> str:
    if holder is None:
        return f"{path.parent} is in use by another process: wait for its end, or give another folder"
    return (
        f"{path.parent} is in use by {holder['work']}, process {holder['owner'].pid} on host {holder['host']} since "
        f"{holder['since']}: wait for its end, stop it, or give another folder"
    )
