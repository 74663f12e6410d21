"""What a run tells: starts.jsonl, metrics.jsonl, TensorBoard events, a progress bar with rate and time left."""

import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm


def note_start(workdir: Path, **facts) -> None:
    """Appends one line to starts.jsonl: when this process began, with which versions, and `facts`."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    record = {"time": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts, "versions": versions}
    with (Path(workdir) / "starts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The records of metrics.jsonl in order; a last line that a kill cut short is left out."""
    path = Path(workdir) / name
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Writer:
    """Appends records {"step": int, name: float} to metrics.jsonl and to TensorBoard, and moves the bar.

    A value that is not finite, for which JSON has no word, is left out. On resume at `start`, records of later steps,
    which that run will write again, are dropped.
    workdir: None for one that does nothing, as of every process but the first."""

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
        self.events = None
        if workdir is None:
            return
        self.path = Path(workdir) / "metrics.jsonl"
        kept = [record for record in read(workdir) if record["step"] <= start]
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(record) + "\n" for record in kept))
        scratch.rename(self.path)
        self.events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.events is None:
            return
        record = {"step": step} | {n: round_off(value) for n, value in values.items() if math.isfinite(value)}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self.events.add_scalar(name, value, step)
        shown = [
            n
            for n in ("loss", "loss_noise", "loss_output", "loss_feature", "images_per_second")
            if n in record
        ]
        if shown:
            self.bar.set_postfix(
                {n.replace("images_per_second", "images/s"): f"{record[n]:.3g}" for n in shown}
            )

    def say(self, line: str) -> None:
        """Above the bar."""
        if self.events is not None:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()
        self.bar.close()


def round_off(value: float) -> float:
    """Seven significant digits, what float32 has."""
    return float(f"{float(value):.7g}")
