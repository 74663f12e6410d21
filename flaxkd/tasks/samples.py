"""The sheet of samples of a run: the validation prompts, drawn with the trained networks and with their references."""

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from flaxkd.diffusion import samplers
from flaxkd.drawing import batches, grids
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import hosts
from flaxkd.models.attention import DotProductAttention
from flaxkd.pretrained import Folder, build
from flaxkd.training import settings
from flaxkd.training.task import Network, Task
from flaxkd.weights import quantize

# Pixels per device at a time. On a TPU v5e: 0.8 GiB of temporaries at 512 pixels, 1.5 for an SD 2.1 picture at 768.
PIXELS = 512**2


def schedule(folder: Folder, sampler: str | None = None, steps: int | None = None) -> samplers.Schedule | None:
    """The schedule of `config.sample`, by default the folder's own.

    If it cannot be had, a warning and the default sampler, or None: no pictures.
    A training does not end for the sake of its pictures, and a teacher's scheduler need not be one flaxkd knows.
    Raises ValueError for a sampler's name that is no name."""
    config = folder.config("scheduler")
    wanted = sampler and samplers.name_of(sampler)
    for kind in dict.fromkeys((wanted, samplers.DEFAULT)):
        try:
            return samplers.schedule(kind, config, steps or samplers.usual_steps(kind, config))
        except ValueError as error:
            then = "without pictures" if kind == samplers.DEFAULT else f"its pictures are drawn with {samplers.DEFAULT}"
            warnings.warn(f"{error}. The training goes on, {then}", stacklevel=2)
    return None


class Sheet:
    """Draws the sheet of a run. All processes compute, since the parameters may be spread over the devices of all.

    config, folder, task: of the run. trained: the weights before the first step, on the devices, like `frozen`.
    dtype: of the compute. Columns that training does not change are drawn at the start and kept as pictures."""

    def __init__(self, config, folder: Folder, task: Task, trained: dict, frozen: dict, dtype, mesh):
        self.config, self.task, self.dtype = config, task, dtype
        self.drawn: dict[str, np.ndarray] = {}
        self.pipeline: Pipeline | None = None
        # A run without samples, or a task without columns, has no sheet and needs no autoencoder on the devices.
        columns = lambda a, b: [n.params for n in task.columns(a, b).values()]
        if not settings.draws(config) or not jax.eval_shape(columns, trained, frozen):
            return
        self.schedule = schedule(folder, config.sample.sampler, config.sample.steps)
        if self.schedule is None:
            return
        self.pipeline = Pipeline.from_folder(folder, "the run", dtype, mesh, parts=["vae"])
        self.prompts = settings.listed(config.sample.prompts)
        shape = (len(self.prompts), *folder.latent_shape(config.data.resolution))
        self.noise = np.random.default_rng(config.seed).standard_normal(shape, np.float32)
        self.drawn = self._pictures(task.before(trained, frozen))

    def draw(self, trained: dict, frozen: dict, path: Path) -> None:
        """Draws the sheet of these weights. The first process writes it."""
        if self.pipeline is None:
            return
        columns = self.drawn | self._pictures(self.task.columns(trained, frozen))
        if hosts.is_first():
            grids.grid(columns, self.prompts, path)

    def _pictures(self, networks: Mapping[str, Network]) -> dict[str, np.ndarray]:
        """{title: uint8[prompts, H, W, 3]}."""
        return {title: self._draw(title, network) for title, network in networks.items()}

    def _draw(self, title: str, network: Network) -> np.ndarray:
        mesh, config = self.pipeline.mesh, self.config
        attend = DotProductAttention(mesh, config.attention)
        own = {"unet": self.pipeline.folder.config("unet")} | network.configs
        modules = {
            part: build(part, unet, self.dtype, **({"attend": attend} if part == "unet" else {}))
            for part, unet in own.items()
        }
        modules["unet"] = quantize.wrapped(modules["unet"], network.params["unet"], network.quantization)
        pipeline = self.pipeline.with_parts(modules, network.params)
        folder, steps = pipeline.folder, self.schedule
        if network.drawn_as is not None:
            folder = network.drawn_as
            steps = schedule(folder) or steps
        # All devices draw, a few pictures each at a time: at full size, more would need more memory than training.
        each = min(-(-len(self.prompts) // mesh.size), max(PIXELS // config.data.resolution**2, 1))
        drawn = batches.draw(
            pipeline,
            self.prompts,
            functools.partial(self._noise, steps),
            steps,
            folder.guidance,
            batch_size=each * mesh.size,
            finite=False,
            words=f"drawing, {title}" if hosts.is_first() else None,
            leave=False,
        )
        return np.stack(list(drawn))

    def _noise(self, steps: samplers.Schedule, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        first, added = self.noise[i], steps.noise
        between = lambda: np.random.default_rng([self.config.seed, i]).standard_normal((len(added), *first.shape))
        return first, None if added is None else between().astype(np.float32)
