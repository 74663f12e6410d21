"""`Task`: what is trained, and against what. Trainer, planner and benchmark work with any task."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxkd.data.sources import Source
from flaxkd.export import Adapted
from flaxkd.pretrained import Folder
from flaxkd.weights.quantize import Quantization


class Network(NamedTuple):
    """A pipeline for a sheet of samples: the run's folder, with these parts replaced."""

    configs: Mapping[str, dict]  # {part: its config.json} of parts unlike the teacher's
    params: Mapping[str, dict]  # {part: tree}
    drawn_as: Folder | None = None  # with its own sampler, steps and guidance; None: with those of the run
    quantization: Quantization | None = None  # of its UNet


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is trained, and against what. A function of (config, folder, dtype, mesh) makes it: see flaxkd.tasks.

    batch: one example, {name: jax.ShapeDtypeStruct} without the batch axis; the names are those of
        data/loader.py ("images"; or of "moments", "input_ids", "input_ids_2", "time_ids", "masks" and "masked_latents"
        those it reads). A batch with buckets differs in the sizes of its moments.
    trained: {part: tree} in float32. frozen: {name: tree} in compute precision, without gradients, never saved.
    open_data(pictures, split) -> reader of the batch, as those of data/loader.py; None: that of data/encoding.py.
    prepare(key, batch) -> inputs: all randomness, for the whole batch at once: neither the number of devices nor the
        accumulation changes it. The batch is the first axis of every leaf of inputs.
    loss(trained, frozen, average, inputs) -> (loss, metrics): means over the batch, float32 scalars, no randomness.
        average: the moving average of `trained`, or {} if the run keeps none.
    configs: {part: its config.json} of the exported parts.
    assemble(trained, frozen) -> {part: whole parameters} of at least those parts.
    columns(trained, frozen) -> {title: Network}: what a sheet of samples shows of these weights; {}: no sheet.
    before(trained, frozen) -> {title: Network}: what it shows beside them, unchanged by training. Called once, with the
        weights before the first step.
    finish(trained, held_out) -> {part: config.json}: config known only at the end. held_out: a batch of examples.
    drawn_as: the folder whose sampler and guidance its weights are drawn and exported with; None: the teacher's.
    passes: (a UNet's config.json, forward passes of an example through it, a backward pass counted as two), for
        estimates; () for a task without a UNet.
    adapted: what `trained` is beside, if that is adapters; None: whole parts.
    """

    batch: Mapping[str, jax.ShapeDtypeStruct]
    trained: dict
    frozen: dict
    prepare: Callable[[Any, dict], Any]
    loss: Callable[[dict, dict, dict, Any], tuple[jax.Array, dict]]
    configs: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    assemble: Callable[[dict, dict], dict] = lambda trained, frozen: trained
    columns: Callable[[dict, dict], dict[str, Network]] = lambda trained, frozen: {}
    before: Callable[[dict, dict], dict[str, Network]] = lambda trained, frozen: {}
    finish: Callable[[dict, dict], dict[str, dict]] = lambda trained, held_out: {}
    drawn_as: Folder | None = None
    passes: tuple[tuple[dict, int], ...] = ()
    adapted: Adapted | None = None
    open_data: Callable[[Source, str], Any] | None = None

    def shapes(self, n: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of n examples, as shapes."""
        return {name: jax.ShapeDtypeStruct((n, *x.shape), x.dtype) for name, x in self.batch.items()}

    def random_batch(self, n: int, seed: int) -> dict[str, np.ndarray]:
        """A batch of n examples for timing: unit Gaussian floats, and integers from 0 to 99."""
        rng = np.random.default_rng(seed)

        def sample(x):
            if np.issubdtype(x.dtype, np.integer):
                return rng.integers(0, 100, x.shape).astype(x.dtype)
            return rng.standard_normal(x.shape, np.float32).astype(x.dtype)

        return {name: sample(x) for name, x in self.shapes(n).items()}
