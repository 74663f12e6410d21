"""What a run reports: starts.jsonl, metrics.jsonl, TensorBoard, Weights & Biases, a progress bar with the time left.

All of it only watches the run. What cannot be written is said once, and the training goes on.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from flaxkd.machine import checkpoints, files, progress

FILE, STARTS = "metrics.jsonl", "starts.jsonl"
SHOWN = ("loss", "loss_noise", "loss_output", "loss_feature", "images_per_second")  # in the bar
FLUSHED = 10  # seconds, after which TensorBoard shows what was written

_warned: set[str] = set()


@contextlib.contextmanager
def watching(what: str) -> Iterator[None]:
    """In this context, no error ends the run. The first one of each `what`, such as "metrics.jsonl", is a warning."""
    try:
        yield
    except Exception as error:
        if what not in _warned:
            _warned.add(what)
            reason = checkpoints.in_a_line(error.__cause__ if isinstance(error, files.DiskFull) else error)
            progress.write(f"warning: {what} cannot be written ({reason}); the training goes on")


def note_start(workdir: Path, **facts) -> None:
    """Appends one line to starts.jsonl: the time of the start, the versions, and `facts`."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    record = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts, "versions": versions}
    with watching(STARTS), (Path(workdir) / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl, in order."""
    return files.read_jsonl(Path(workdir) / FILE)


class Lines:
    """Appends to metrics.jsonl. Lines that a full disk refuses are kept, and written when there is room again."""

    def __init__(self, workdir: Path, start: int, config: Mapping):
        self.path, self.waiting = workdir / FILE, []
        # A start from step 0 measures step 0 again.
        kept = [record for record in read(workdir) if record["step"] <= start and start > 0]
        files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.waiting.append(json.dumps({"step": step, **values}) + "\n")
        with self.path.open("ab") as file:
            size = file.seek(0, os.SEEK_END)
            try:
                file.write("".join(self.waiting).encode())
                file.flush()
            except OSError:
                os.truncate(self.path, size)  # half a line would hide all that follow
                raise
        self.waiting.clear()

    def close(self) -> None:
        pass


class TensorBoard:
    """Events for TensorBoard, written at once: the thread of tensorboardX's own writer dies with its first failed
    write, and whoever gives it more waits for ever."""

    def __init__(self, workdir: Path, start: int, config: Mapping):
        folder = workdir / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self.events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        begun = SessionLog(status=SessionLog.START)  # events of later steps, by a run before this one, do not count
        self.events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=begun))
        self.flushed = -FLUSHED

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            scalar = summary.scalar(name, value)
            self.events.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
        if time.monotonic() - self.flushed >= FLUSHED:
            self.events.flush()
            self.flushed = time.monotonic()

    def close(self) -> None:
        self.events.close()


class WeightsAndBiases:
    """A run on wandb.ai, or on disk for WANDB_MODE=offline. It has the workdir's name, and resumes with it."""

    def __init__(self, workdir: Path, start: int, config: Mapping):
        import wandb

        path = workdir / "wandb.json"
        name = json.loads(path.read_text(encoding="utf-8"))["id"] if path.is_file() else wandb.util.generate_id()
        self.run = wandb.init(
            project="flaxkd",
            name=workdir.absolute().name,
            id=name,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
        )
        files.write_json(path, {"id": name})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


# {name: (workdir, first step, config) -> what `write`s figures of a step and `close`s}. The first two always watch.
WATCHERS: dict[str, Callable] = {FILE: Lines, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}
ALWAYS = (FILE, "tensorboard")


class Writer:
    """Gives the figures {name: float} of steps to WATCHERS, and advances the bar.

    Non-finite values are left out: JSON has no word for them. On resume at `start`, records of later steps are
    dropped: the run will write them again. workdir: None for a writer that does nothing, as in every process but the
    first. also: WATCHERS asked for. config: of the run, for those that keep it."""

    def __init__(
        self, workdir: Path | None, start: int, steps: int, also: tuple[str, ...] = (), config: Mapping | None = None
    ):
        self.bar = progress.Bar(steps, initial=start, first=progress.COMPILING, disable=workdir is None)
        self.pending: list[tuple[int, dict]] = []  # measured on the device, not fetched yet
        self.fetched: list[tuple[int, dict]] = []  # not written yet
        self.since, self.logged = time.monotonic(), start
        self.writes, self.watchers = workdir is not None, {}
        for name in (*ALWAYS, *also) if self.writes else ():
            with watching(name):
                self.watchers[name] = WATCHERS[name](Path(workdir), start, config or {})

    def add(self, step: int, values: dict) -> None:
        """Keeps the measurements of a step, {name: scalar on the device}, for `fetch`."""
        self.pending.append((step, values))
        self.bar.update()

    def fetch(self) -> list[tuple[int, dict]]:
        """[(step, {name: number}), ...] since the last call. One wait for the device, not one per step."""
        values = jax.device_get([values for _, values in self.pending])
        fetched = [(step, found) for (step, _), found in zip(self.pending, values, strict=True)]
        self.pending.clear()
        self.fetched += fetched
        return fetched

    def log(self, batch_size: int) -> None:
        """Writes the means over the unskipped steps fetched since the last call, and the rate."""
        if not self.fetched:
            return
        step, now = self.fetched[-1][0], time.monotonic()
        rate = (step - self.logged) * batch_size / max(now - self.since, 1e-9)
        values = [found for _, found in self.fetched]
        self.fetched.clear()
        taken = [found for found in values if not found["skipped_in_a_row"]] or values
        mean = {name: float(np.mean([m[name] for m in taken])) for name in values[0] if "skipped" not in name}
        if skipped := int(values[-1]["skipped"]):
            mean["skipped"] = skipped
        self.write(step, mean | {"images_per_second": rate})
        self.logged = step
        self.restart()

    def restart(self) -> None:
        """Restarts the measurement of the rate: the time until now was not spent on steps."""
        self.since = time.monotonic()

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """In this context the run does something other than steps. The bar says what, and no rate counts its time."""
        begun = time.monotonic()
        with self.bar.during(what):
            yield
        self.since += time.monotonic() - begun

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self.writes:
            return
        record = {name: round_off(value) for name, value in values.items() if math.isfinite(value)}
        for name, watcher in self.watchers.items():
            with watching(name):
                watcher.write(step, record)
        shown = {name: record[name] for name in SHOWN if name in record}
        if shown:
            self.bar.set_postfix(
                {name.replace("images_per_second", "images/s"): f"{value:.3g}" for name, value in shown.items()}
            )

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.writes:
            progress.write(line)

    def close(self) -> None:
        while self.watchers:
            name, watcher = self.watchers.popitem()
            with watching(name):
                watcher.close()
        self.bar.close()


def round_off(value: float) -> float:
    """Rounds to seven significant digits, the precision of float32."""
    return float(f"{float(value):.7g}")
