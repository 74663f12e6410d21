"""Cases run in processes of their own: a segmentation fault or an endless loop ends one process, and is told."""

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PATIENCE = 60.0  # seconds, after which a case hangs


class Outcome(NamedTuple):
    """kind: "read", "refused", or a fault: "wrong", "traceback", "died", "hangs". text: the message."""

    target: str
    number: int
    kind: str
    text: str

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("read", "refused")


def run(cases: list[tuple[str, int]], seed: int, processes: int = 2) -> Iterator[Outcome]:
    """Runs the cases (target, number), and yields how each ended. The same seed gives the same cases."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}  # before the processes import JAX
    waiting = list(reversed(cases))
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        workers = [_Worker(scratch / str(i), seed) for i in range(min(processes, len(cases)))]
        for worker in workers:
            stack.callback(worker.end)
        while waiting or any(worker.case for worker in workers):
            for worker in workers:
                if worker.case is None and waiting:
                    worker.begin(waiting.pop())
            busy = [worker for worker in workers if worker.case]
            multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=1)
            for worker in busy:
                if (outcome := worker.outcome()) is not None:
                    yield outcome


class _Worker:
    def __init__(self, scratch: Path, seed: int):
        self.scratch, self.seed, self.case = scratch, seed, None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")  # which imports once, and forks
        context.set_forkserver_preload(["tests.fuzz.targets"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.scratch, self.seed), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, case: tuple[str, int]) -> None:
        self.case, self.since = case, time.monotonic()
        self.pipe.send(case)

    def outcome(self) -> Outcome | None:
        """How the case ended; None while it runs."""
        kind, text = None, ""
        if self.pipe.poll():
            try:
                kind, text = self.pipe.recv()
            except EOFError:
                self.process.join()
                kind, text = "died", f"exit status {self.process.exitcode}"
        elif time.monotonic() - self.since > PATIENCE:
            kind, text = "hangs", f"for {PATIENCE:.0f} seconds"
        if kind == "begins":
            self.since, kind = time.monotonic(), None
        if kind is None:
            return None
        if kind in ("died", "hangs"):
            self.end()
            self._start()
        case, self.case = self.case, None
        return Outcome(*case, kind, text)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _work(pipe, scratch: Path, seed: int) -> None:
    with open(os.devnull, "w") as nowhere:  # warnings and bars are not for whoever reads the table
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    from tests.data import image_sets
    from tests.fuzz import targets

    image_sets.CAPTIONS[:] = targets.CAPTIONS
    written: dict[str, Path] = {}
    while True:
        try:
            name, number = pipe.recv()
        except EOFError:
            return
        target, work = targets.TARGETS[name], scratch / "work"
        if name not in written:
            written[name] = scratch / f"pristine-{len(written)}-{os.getpid()}" / "input"
            written[name].parent.mkdir(parents=True)
            target.write(written[name])
        work.mkdir(parents=True)
        pipe.send(("begins", ""))  # imports and the input took their time
        rng = np.random.default_rng([seed, sorted(targets.TARGETS).index(name), number])
        try:
            text = targets.case(target, written[name], work, rng)
            pipe.send(("read" if text == "read" else "refused", text))
        except targets.Wrong as error:
            pipe.send(("wrong", str(error)))
        except BaseException:
            pipe.send(("traceback", traceback.format_exc()))
        finally:
            shutil.rmtree(work, ignore_errors=True)
