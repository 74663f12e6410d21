"""What a benchmark times, of a teacher or a student: a denoising step, a picture, a training step.

`against_torch` has the same three in PyTorch.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxkd import distill, pretrained
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import sharding
from flaxkd.models.attention import DotProductAttention
from flaxkd.training import step

WORKS = ("denoise", "image", "train")


class Subject(NamedTuple):
    """A network, and the work it is given. `batch_size` images at a time, which with guidance is twice in the UNet."""

    name: str  # "teacher", or a row of the students' table
    config: ConfigDict  # of its training
    source: Path  # the teacher's pipeline folder
    dtype: Any  # of the compute
    steps: int  # of the sampler
    mesh: Mesh
    task: step.Task
    batch: dict[str, np.ndarray]  # moments float32[b, h, w, 2c], input_ids int32[b, l]
    prompts: list[str]

    @property
    def unet_config(self) -> dict:
        return self.task.configs["unet"]

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a denoising step: noisy latents float32[2b, h, w, c], timesteps int32[2b], states float32[2b, l, d]."""
        rng = np.random.default_rng(0)
        b, h, w, c = self.batch["moments"].shape
        shape = 2 * b, self.batch["input_ids"].shape[1], self.unet_config["cross_attention_dim"]
        noisy_latents = rng.standard_normal((2 * b, h, w, c // 2), np.float32)
        return noisy_latents, np.full(2 * b, 500, np.int32), rng.standard_normal(shape, np.float32)


class Prepared(NamedTuple):
    """Work that is ready. `call()` does it once, and returns when it is done."""

    call: Callable[[], Any]
    first: float  # seconds from nothing until it was done once: tracing and compiling, or reading them back
    flops: float | None = (
        None  # of the compiled program on all devices, by XLA's count: a multiply-add is two
    )
    peak_bytes: int | None = None  # its arguments, results and temporaries, by XLA's plan, on one device


def subject(name: str, config: ConfigDict, source: Path, *, steps: int) -> Subject:
    """The teacher of the folder `source` ("teacher"), or the student of that name cut from it.

    Raises ValueError, as `distill.task` does, if there is no such student or it cannot be cut from this teacher."""
    config = config.copy_and_resolve_references()
    config.student = None if name == "teacher" else name
    dtype = sharding.compute_dtype(config.dtype)
    tokenizer = pretrained.load_tokenizer(source)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    task = distill.task(config, source, dtype, tokenizer, mesh)
    unet = task.configs["unet"]
    size = unet["sample_size"]
    rng = np.random.default_rng(1)
    moments = rng.standard_normal((config.batch_size, size, size, 2 * unet["in_channels"]), np.float32)
    prompts = [f"apple {i}" for i in range(config.batch_size)]
    batch = {"moments": moments, "input_ids": pretrained.tokenize(tokenizer, prompts)}
    return Subject(name, config, source, dtype, steps, mesh, task, batch, prompts)


def prepare(subject: Subject, work: str) -> Prepared:
    """One of WORKS, compiled, and done once."""
    begin = time.perf_counter()
    call, compiled = {"denoise": _denoise, "image": _image, "train": _train}[work](subject)
    call()
    return Prepared(call, time.perf_counter() - begin, *facts(compiled))


def facts(compiled: jax.stages.Compiled | None) -> tuple[float | None, int | None]:
    """(FLOPs on all devices, peak bytes on one) of a compiled program, as far as its backend tells."""
    if compiled is None:
        return None, None
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    devices = len(jax.tree.leaves(compiled.input_shardings)[0].device_set)
    needed = memory and sum(
        (
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes,
            memory.temp_size_in_bytes,
            -memory.alias_size_in_bytes,
        )
    )
    return (cost["flops"] * devices if "flops" in cost else None), needed


def _unet(subject: Subject) -> tuple:
    """(module, params on all devices) as one draws with them."""
    params = jax.tree.map(lambda x: np.asarray(x, subject.dtype), subject.task.params["unet"])
    attend = DotProductAttention(subject.mesh)
    unet = pretrained.build("unet", subject.unet_config, subject.dtype, attend=attend)
    return unet, jax.device_put(params, sharding.replicated(subject.mesh))


def _denoise(subject: Subject) -> tuple:
    unet, params = _unet(subject)
    inputs = jax.device_put(subject.inputs, sharding.batch(subject.mesh))
    compiled = (
        jax.jit(
            lambda params, *inputs: unet.apply({"params": params}, *inputs),
            compiler_options=sharding.compiler_options(),
        )
        .lower(params, *inputs)
        .compile()
    )
    return lambda: jax.block_until_ready(compiled(params, *inputs)), compiled


def _image(subject: Subject) -> tuple:
    """Pictures of the prompts, from the text to the pixels, as `Pipeline` draws them."""
    unet, params = _unet(subject)
    whole = Pipeline.from_pretrained(subject.source, subject.dtype, subject.mesh)
    pipeline = dataclasses.replace(
        whole, modules=whole.modules | {"unet": unet}, params=whole.params | {"unet": params}
    )
    draw = lambda: pipeline(
        subject.prompts, num_inference_steps=subject.steps, batch_size=len(subject.prompts), progress=False
    )
    return draw, None


def _train(subject: Subject) -> tuple:
    """One optimizer step, with a batch that is on the device."""
    config, task, mesh, tx = subject.config, subject.task, subject.mesh, step.optimizer(subject.config)
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    like = jax.eval_shape(lambda params: step.init_state(params, tx, bool(config.ema_decay)), task.params)
    shardings = sharding.params(mesh, like)
    state = jax.device_put(step.init_state(task.params, tx, bool(config.ema_decay)), shardings)
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
