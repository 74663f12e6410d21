"""Jobs and the queue between the clients and the device: bounded, first come first served, filled up with what fits.

A job is one request, a row one of its pictures. The event loop submits and cancels, the device's thread takes rows and
reports: everything here is safe to call from both.
"""

import collections
import contextlib
import dataclasses
import secrets
import threading
import time
from concurrent.futures import Future, InvalidStateError

from flaxkd.serve.requests import Refused, Request

KEPT = 64  # finished jobs whose pictures can still be fetched


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way. pictures: PNG bytes, one for each of `request.count` when it is done.

    done: resolved when all pictures are there, when it failed, or when it was cancelled. seconds: of the batches that
    drew its pictures, without waiting."""

    request: Request
    origin: str  # the API it came by
    id: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(16))
    created: float = dataclasses.field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    steps_done: int = 0
    batch: int = 0  # pictures that the largest of its batches drew together
    seconds: float = 0.0
    error: str | None = None
    cancelled: bool = False
    pictures: list[bytes | None] = dataclasses.field(default_factory=list)
    done: Future = dataclasses.field(default_factory=Future)

    def __post_init__(self):
        self.pictures = [None] * self.request.count

    @property
    def steps(self) -> int:
        """Steps of all its pictures."""
        return self.request.count * len(self.request.schedule.timesteps)

    @property
    def state(self) -> str:
        if self.cancelled:
            return "cancelled"
        if self.done.done():
            return "failed" if self.error else "completed"
        return "queued" if self.started is None else "generating"

    def end(self, error: str | None = None) -> None:
        """Resolves `done`, once."""
        with contextlib.suppress(InvalidStateError):
            self.error, self.finished = self.error or error, self.finished or time.time()
            self.done.set_result(None)


@dataclasses.dataclass(frozen=True)
class Row:
    """Picture `index` of a job."""

    job: Job
    index: int


class Queue:
    """most: pictures that may wait."""

    def __init__(self, most: int):
        self.most = most
        self.closed = False
        self.jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
        self._rows: collections.deque[Row] = collections.deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Pictures that wait."""
        return len(self._rows)

    def submit(self, request: Request, origin: str) -> Job:
        """Raises Refused: 429 where the queue is full, 503 where the server is about to end."""
        job = Job(request, origin)
        with self._changed:
            if self.closed:
                raise Refused("the server is shutting down", 503)
            if len(self._rows) + request.count > self.most:
                raise Refused(f"{len(self._rows)} pictures wait, and at most {self.most} may: try again later", 429)
            self._rows.extend(Row(job, i) for i in range(request.count))
            self.jobs[job.id] = job
            over = [other.id for other in self.jobs.values() if other.done.done()]
            for name in over[: max(0, len(over) - KEPT)]:
                del self.jobs[name]
            self._changed.notify_all()
        return job

    def ahead(self, job: Job) -> int:
        """Pictures that wait before the first one of a job."""
        with self._changed:
            return next((i for i, row in enumerate(self._rows) if row.job is job), 0)

    def take(self, most: int, timeout: float | None) -> list[Row]:
        """The row that has waited longest, and up to `most` - 1 that can be drawn with it; [] after `timeout`.

        Nobody waits for a batch to fill up: rows gather while the device draws the one before."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self.closed, timeout)
            if not self._rows:
                return []
            together = self._rows[0].job.request.together
            taken = [row for row in self._rows if row.job.request.together == together][:most]
            gone = {id(row) for row in taken}
            self._rows = collections.deque(row for row in self._rows if id(row) not in gone)
            for row in taken:
                row.job.started = row.job.started or time.time()
            return taken

    def cancel(self, job: Job) -> None:
        """Its waiting pictures are not drawn. One that is being drawn stops with the next step, unless others are
        drawn with it. A finished job stays as it is."""
        with self._changed:
            if not job.done.done():
                job.cancelled = True
                self._forget(job)
                job.end()

    def fail(self, job: Job, error: str) -> None:
        """Ends a job with the pictures it still waits for."""
        with self._changed:
            self._forget(job)
            job.end(error)

    def close(self) -> None:
        """Takes no more jobs, and ends those that have not begun. The others are finished."""
        with self._changed:
            self.closed = True
            for job in [row.job for row in self._rows if row.job.started is None]:
                self._forget(job)
                job.end("the server is shutting down")
            self._changed.notify_all()

    def _forget(self, job: Job) -> None:
        self._rows = collections.deque(row for row in self._rows if row.job is not job)
