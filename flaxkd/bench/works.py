"""The timed work of a teacher or a student: a denoising step, a batch of pictures, that in few steps, a training step.

torch_works.py has the same four in PyTorch.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxkd import tasks
from flaxkd.diffusion import samplers
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import sharding
from flaxkd.pretrained import PARTS, Folder
from flaxkd.training import step
from flaxkd.training.task import Task

FEW = "lcm"  # the sampler of pictures in few steps


class Subject(NamedTuple):
    """A network and its work: `batch_size` images at a time, and with guidance twice that in the UNet."""

    name: str  # "teacher", or a row of the students' table
    config: ConfigDict  # of its training
    folder: Folder  # of the teacher
    dtype: Any  # of the compute
    steps: int  # of the sampler
    mesh: Mesh
    task: Task
    batch: dict[str, np.ndarray]  # of its task
    prompts: list[str]

    @property
    def unet_config(self) -> dict:
        return self.task.configs.get("unet") or self.folder.config("unet")

    @property
    def unet(self) -> dict:
        """The UNet's parameters: those of the task, or of the teacher if the task has none."""
        assembled = self.task.assemble(self.task.trained, self.task.frozen)
        return assembled["unet"] if "unet" in assembled else self.folder.params("unet")

    @property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """For a denoising step: noisy latents float32[2b, h, w, c], timesteps int32[2b], states float32[2b, l, d]; of
        SDXL also text_embeds float32[2b, e] and time_ids float32[2b, 6]."""
        rng, b = np.random.default_rng(0), 2 * self.config.batch_size
        _, _, _, *added = PARTS["unet"].inputs(PARTS["unet"].config.from_dict(self.unet_config))
        h, w, c = self.folder.latent_shape()
        c = self.unet_config.get("in_channels", c)  # of an inpainting UNet, also what it sees beside the noisy latents
        shapes = [(h, w, c), (self.folder.text_length, self.unet_config["cross_attention_dim"])]
        shapes += [x.shape[1:] for x in added]
        noisy_latents, *conditions = (rng.standard_normal((b, *shape), np.float32) for shape in shapes)
        return noisy_latents, np.full(b, 500, np.int32), *conditions


class Prepared(NamedTuple):
    """Compiled work. `call()` runs it once, and returns when it is done."""

    call: Callable[[], Any]
    first: float  # seconds until the end of the first run: tracing, and compiling or loading the program
    flops: float | None = None  # of the compiled program on all devices, as `facts` gives them
    peak_bytes: int | None = None  # arguments, results and temporaries on one device, as assigned by XLA


def subject(name: str, config: ConfigDict, folder: Folder, *, steps: int) -> Subject:
    """The teacher of a folder ("teacher"), or the student of that name, cut from it.

    Raises ValueError, as the task does, for an unknown student or one that cannot be cut from this teacher."""
    config = config.copy_and_resolve_references()
    config.student = None if name == "teacher" else name
    config.data.resolution = folder.resolution  # native to its networks
    dtype = sharding.compute_dtype(config.dtype)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    task = tasks.make(config, folder, dtype, mesh)
    prompts = [f"apple {i}" for i in range(config.batch_size)]
    batch = task.random_batch(config.batch_size, seed=1)
    return Subject(name, config, folder, dtype, steps, mesh, task, batch, prompts)


def prepare(subject: Subject, work: str) -> Prepared:
    """One of WORKS, compiled and run once."""
    begin = time.perf_counter()
    call, compiled = WORKS[work](subject)
    call()
    return Prepared(call, time.perf_counter() - begin, *facts(compiled))


def facts(compiled: jax.stages.Compiled | None) -> tuple[float | None, int | None]:
    """(FLOPs on all devices, peak bytes on one) of a compiled program; None where the backend reports nothing.

    A multiply-add counts as two. On a GPU, XLA counts none of those in cuDNN and cuBLAS: None."""
    if compiled is None:
        return None, None
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    devices = jax.tree.leaves(compiled.input_shardings)[0].device_set
    cost = {} if next(iter(devices)).platform in ("gpu", "cuda", "rocm") else cost
    needed = memory and sum(
        (
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.temp_size_in_bytes,
            -memory.alias_size_in_bytes,
        )
    )
    return (cost["flops"] * len(devices) if "flops" in cost else None), needed


def _pipeline(subject: Subject) -> Pipeline:
    """The pipeline to draw with: the folder's, with the subject's own UNet."""
    parts = [part for part in subject.folder.parts if part != "unet"]
    params = jax.tree.map(lambda x: np.asarray(x, subject.dtype), subject.unet)
    params = jax.device_put(params, sharding.replicated(subject.mesh))
    folder = subject.folder.replace({"unet": subject.unet_config}, {})
    return Pipeline.from_folder(folder, subject.name, subject.dtype, subject.mesh, parts, {"unet": params})


def _denoise(subject: Subject) -> tuple:
    pipeline = _pipeline(subject)
    unet, params = pipeline.modules["unet"], pipeline.params["unet"]
    inputs = jax.device_put(subject.inputs, sharding.batch(subject.mesh))
    apply = lambda params, *inputs: unet.apply({"params": params}, *inputs)
    compiled = jax.jit(apply, compiler_options=sharding.compiler_options()).lower(params, *inputs).compile()
    return lambda: jax.block_until_ready(compiled(params, *inputs)), compiled


def _image(subject: Subject) -> tuple:
    """Pictures of the prompts, from text to pixels, as drawn by `Pipeline`."""
    return _draw(subject, sampler=samplers.DEFAULT, num_inference_steps=subject.steps)


def _few_steps(subject: Subject) -> tuple:
    """The same as a model of few steps draws them, such as configs/lcm.py makes of any network: without guidance."""
    return _draw(subject, sampler=FEW, num_inference_steps=samplers.SAMPLERS[FEW].steps, guidance_scale=1.0)


def _draw(subject: Subject, **options) -> tuple:
    pipeline = _pipeline(subject)
    return lambda: pipeline(subject.prompts, batch_size=len(subject.prompts), progress=False, **options), None


def _train(subject: Subject) -> tuple:
    """One optimizer step, with the batch already on the device."""
    config, task, mesh, tx = subject.config, subject.task, subject.mesh, step.optimizer(subject.config)
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    like = step.state_shapes(task, config, tx)
    shardings = sharding.params(mesh, like)
    state = jax.device_put(step.init_state(task.trained, tx, bool(config.ema_decay)), shardings)
    frozen = jax.device_put(task.frozen, sharding.params(mesh, task.frozen))
    batch = jax.device_put(subject.batch, sharding.batch(mesh))
    train_step, _ = step.make_step(task, config, tx, mesh, like)
    key = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
    compiled = train_step.lower(state, frozen, batch, key).compile()

    def call() -> dict:
        nonlocal state
        state, metrics = compiled(state, frozen, batch, key)
        return jax.block_until_ready((state, metrics))[1]

    return call, compiled


WORKS = {"denoise": _denoise, "image": _image, "few_steps": _few_steps, "train": _train}
