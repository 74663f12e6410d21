"""What a run reports: starts.jsonl, metrics.jsonl, TensorBoard events, a progress bar with rate and time left."""

import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from flaxkd.machine import files

FILE, STARTS = "metrics.jsonl", "starts.jsonl"
SHOWN = ("loss", "loss_noise", "loss_output", "loss_feature", "images_per_second")  # in the bar


def note_start(workdir: Path, **facts) -> None:
    """Appends one line to starts.jsonl: the time of the start, the versions, and `facts`."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    record = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts, "versions": versions}
    with (Path(workdir) / STARTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl, in order."""
    return files.read_jsonl(Path(workdir) / FILE)


class Writer:
    """Appends records {"step": int, name: float} to metrics.jsonl and to TensorBoard, and advances the bar.

    Non-finite values are left out: JSON has no word for them. On resume at `start`, records of later steps are
    dropped: the run will write them again. workdir: None for a writer that does nothing, as in every process but the
    first."""

    def __init__(self, workdir: Path | None, start: int, steps: int):
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=1,
            disable=workdir is None,
        )
        self.pending: list[tuple[int, dict]] = []  # measured on the device, not fetched yet
        self.since, self.logged = time.time(), start
        self.events = None
        if workdir is None:
            return
        self.path = Path(workdir) / FILE
        kept = [record for record in read(workdir) if record["step"] <= start]
        files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1)

    def add(self, step: int, values: dict) -> None:
        """Keeps the measurements of a step, {name: scalar on the device}, for `fetch`."""
        self.pending.append((step, values))
        self.bar.update()

    def fetch(self) -> list[tuple[int, dict]]:
        """[(step, {name: number}), ...] since the last call. One wait for the device, not one per step."""
        values = jax.device_get([values for _, values in self.pending])
        fetched = [(step, found) for (step, _), found in zip(self.pending, values, strict=True)]
        self.pending.clear()
        return fetched

    def log(self, fetched: list[tuple[int, dict]], batch_size: int) -> None:
        """Writes the means over the unskipped steps, and the rate since the last call."""
        step, now = fetched[-1][0], time.time()
        rate = (step - self.logged) * batch_size / max(now - self.since, 1e-9)
        values = [found for _, found in fetched]
        taken = [found for found in values if not found["skipped_in_a_row"]] or values
        mean = {name: float(np.mean([m[name] for m in taken])) for name in values[0] if "skipped" not in name}
        if skipped := int(values[-1]["skipped"]):
            mean["skipped"] = skipped
        self.write(step, mean | {"images_per_second": rate})
        self.logged = step
        self.restart()

    def restart(self) -> None:
        """Restarts the measurement of the rate: the time until now was not spent on steps."""
        self.since = time.time()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.events is None:
            return
        record = {"step": step} | {n: round_off(value) for n, value in values.items() if math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self.events.add_scalar(name, value, step)
        shown = {name: record[name] for name in SHOWN if name in record}
        if shown:
            self.bar.set_postfix(
                {name.replace("images_per_second", "images/s"): f"{value:.3g}" for name, value in shown.items()}
            )

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self.events is not None:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
        self.bar.close()


def round_off(value: float) -> float:
    """Rounds to seven significant digits, the precision of float32."""
    return float(f"{float(value):.7g}")
