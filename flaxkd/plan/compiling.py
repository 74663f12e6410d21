"""The training step, compiled for devices you do not have: its memory, its FLOPs and its communication.

TPU programs compile with libtpu, GPU programs with JAX's CUDA plugin, on any machine and without either device.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from flaxkd import export, tasks
from flaxkd.machine import files, sharding
from flaxkd.models.attention import DotProductAttention
from flaxkd.plan import devices
from flaxkd.pretrained import Folder, build, fresh, published
from flaxkd.training import step
from flaxkd.training.task import Task


class Lowered(NamedTuple):
    """A training step before compilation, and the bytes of its inputs on one device."""

    program: jax.stages.Lowered
    held: dict[str, int]  # "parameters", "optimizer", "average", "teacher", "batch"
    passes: tuple[tuple[dict, int], ...]  # as `Task.passes`, at the size of the latents
    batch_size: int  # images
    attention: str  # the form of the longest one, a name in models.attention.FORMS
    compiler: str  # name and version


class Compiled(NamedTuple):
    """Needs of a compiled step on one device, in bytes except for `flops` (of one step, without custom calls)."""

    needed: int  # peak of arguments, results and temporaries; for a program that does not fit, its request
    temporary: int | None
    flops: float | None
    collectives: dict[str, tuple[int, int]] | None  # kind: (count, bytes of the results); None: not reported
    seconds: float  # taken by compiling

    @property
    def fits(self) -> bool:
        return self.temporary is not None


# Answers to the questions of libtpu about its TPU. There is none.
ELSEWHERE = {
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise it asks Google Cloud for its location, for minutes
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: without this and the next it complains and continues
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it only compiles: another plan, or a training, may run
}


def topology(target: devices.Target) -> list:
    """The devices of a machine you do not have. Raises ValueError if it is unknown or its compiler is not installed."""
    for name, value in ELSEWHERE.items():
        os.environ.setdefault(name, value)
    try:
        if target.platform == "tpu":
            return topologies.get_topology_desc(
                platform="tpu",
                topology_name=target.topology,
                chip_config_name=devices.KINDS[target.kind].chip,
                chips_per_host_bounds=(1, 1, 1) if target.count == 1 else (2, 2, 1),
            ).devices
        description = devices.GPUS[target.kind].description(target.peak.memory)
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=target.topology, target_config=description
        ).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        extra = "plan" if target.platform == "tpu" else "plan-gpu"
        raise ValueError(
            f"cannot compile for {target.name}: {str(error).splitlines()[0]}\n"
            f'Its compiler comes with: pip install "flaxkd[{extra}]"'
        ) from error


def teacher(config, scratch: Path) -> Folder:
    """The teacher's pipeline folder; for a published teacher, a folder without weights and without a download."""
    known = published(config.teacher)
    folder = fresh.skeleton(scratch, known) if known else export.open_model(config.teacher, config.vae)
    return folder.skip_layers(config.clip_skip)


def lower(config, target: devices.Target) -> Lowered:
    """The training step of a configuration for the devices of `target`, without any weights in memory.

    Raises ValueError for a configuration that `flaxkd.train` would refuse on them."""
    there = topology(target)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, there)
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    dtype = sharding.compute_dtype(config.dtype or "bfloat16")
    with tempfile.TemporaryDirectory() as scratch:
        folder = teacher(config, Path(scratch))
        task = _task(config, folder, dtype, mesh)
        size, unet = folder.latent_shape(config.data.resolution)[0], folder.config("unet")
    tx = step.optimizer(config)
    state = step.state_shapes(task, config, tx)
    batch = task.shapes(config.batch_size)
    train_step, _ = step.make_step(task, config, tx, mesh, state)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shardings = sharding.params(mesh, state)
    held = {
        "parameters": _bytes(state.params, shardings.params),
        "optimizer": _bytes(state.opt_state, shardings.opt_state),
        "average": _bytes(state.ema, shardings.ema),
        "teacher": _bytes(task.frozen, sharding.params(mesh, task.frozen)),
        "batch": _bytes(batch, sharding.batch(mesh)),
    }
    try:
        program = train_step.trace(state, task.frozen, batch, key).lower()
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise ValueError(
            f"cannot compile for {target.name}: {error}. Its attention needs cuDNN, which comes with: "
            'pip install "flaxkd[plan-gpu]"; --config.attention=plain works without it'
        ) from error
    attention = longest_attention(config, mesh, unet, size, dtype)
    passes = tuple((unet | {"sample_size": size}, times) for unet, times in task.passes)
    return Lowered(program, held, passes, config.batch_size, attention, there[0].client.platform_version)


def longest_attention(config, mesh, unet: dict, size: int, dtype) -> str:
    """The form of self-attention at the outermost level of a UNet that has any."""
    stages = build("unet", unet).config.down
    level, outermost = next(((i, stage) for i, stage in enumerate(stages) if any(stage.depths)), (0, stages[0]))
    attend, tokens = DotProductAttention(mesh, config.attention), (size >> level) ** 2
    return attend.name(dtype, tokens, tokens, outermost.channels // outermost.heads)


def _task(config, folder: Folder, dtype, mesh) -> Task:
    """The task with shapes in place of parameters: its weights are traced, and only their shapes are kept."""
    made = []

    def weights(trees):
        traced = folder.replace({}, {part: lambda part=part: trees[part] for part in trees})
        made.append(tasks.make(config, traced, dtype, mesh))
        return made[-1].trained, made[-1].frozen

    trained, frozen = jax.eval_shape(weights, {part: folder.shapes(part) for part in folder.parts})
    return dataclasses.replace(made[-1], trained=trained, frozen=frozen)


def _bytes(tree, shardings) -> int:
    """Bytes of a tree of shapes, on the device that holds most."""
    size = lambda x, on: int(np.prod(on.shard_shape(x.shape), dtype=int)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, tree, jax.tree.broadcast(shardings, tree))))


# Without the GPU, XLA cannot time its Triton kernels for matrix products and fails on some: cuBLAS replaces them.
OPTIONS = {"tpu": {}, "gpu": {"xla_gpu_enable_triton_gemm": False}}


def kept(make: Callable, config, lowered: Lowered, target: devices.Target) -> Compiled:
    """make(config, lowered, target), or its earlier result for the same program and the same devices."""
    versions = [make.__name__, lowered.compiler, jax.__version__, TEMPORARY]
    text = json.dumps([lowered.program.as_text(), target.name, target.topology, *versions])
    file = files.cache_home() / "plan" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if file.is_file():
        return Compiled(**files.read_json(file))
    result = make(config, lowered, target)
    with contextlib.suppress(OSError):  # a full disk costs the next plan only time
        files.write_json(file, result._asdict())
    return result


def whole(config, lowered: Lowered, target: devices.Target) -> Compiled:
    """Compiles to the end, machine code included."""
    begin = time.perf_counter()
    try:
        made = lowered.program.compile(OPTIONS[target.platform])
    except jax.errors.JaxRuntimeError as error:
        if (needed := asked(str(error))) is None:
            raise
        return Compiled(needed, None, None, {}, time.perf_counter() - begin)
    memory, cost = made.memory_analysis(), made.cost_analysis() or {}
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    try:
        sent = collectives(made.as_text())
    except jax.errors.JaxRuntimeError:  # this jaxlib may be unable to read the output of a libtpu from another release
        sent = None
    seconds = time.perf_counter() - begin
    return Compiled(needed, memory.temp_size_in_bytes, cost.get("flops"), sent, seconds)


def asked(message: str) -> int | None:
    """Bytes requested by a TPU program, from the message of one that does not fit; None for other messages."""
    # The message of libtpu 0.0.42 and 0.0.52, for arguments, results and temporaries together; then the older one.
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
         "f64": 8, "s64": 8, "u64": 8}  # fmt: skip


def collectives(hlo: str) -> dict[str, tuple[int, int]]:
    """{kind: (count, bytes of the results on one device)} of the collectives in a compiled program's text.

    One in a loop counts once. An operation in two halves, `-start` and `-done`, counts with the second."""
    found: dict[str, tuple[int, int]] = {}
    line = re.compile(rf"= (\([^)]*\)|\S+) ({'|'.join(KINDS)})(-start|-done)?\(")
    for shapes, kind, half in line.findall(re.sub(r"\{[^{}]*\}|/\*[^*]*\*/", "", hlo)):
        if half == "-start":
            continue
        size = sum(
            SIZES.get(dtype, 4) * int(np.prod([int(n) for n in dims.split(",") if n], dtype=int))
            for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
        )
        count, total = found.get(kind, (0, 0))
        found[kind] = count + 1, total + size
    return found


# -- A TPU program, compiled until its memory is fixed -----------------------------------------------------------------
#
# XLA fixes every buffer before it writes machine code, which may take another half hour. A separate process compiles
# with XLA's dumps enabled, and is stopped once they contain the buffers. The size of the machine code stays unknown.

DUMPS = "--xla_dump_to={} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*train_step.*"
# XLA writes the dumps in this order. The last one only shows that the others are complete.
PROGRAM, BUFFERS, MEMORY, LAST = (
    f"*after_optimizations{rest}.txt"
    for rest in ("", "-buffer-assignment", "-memory-usage-report", "_after_buffer_assignment")
)
TOTAL = r"\(color=0\)\s+Total bytes: (\d+)"  # color 0 is device memory; the others are on the chip
# libtpu 0.0.42: "size N, preallocated-temp", and 0.0.52: "size N, page 0, preallocated-temp"
TEMPORARY = r"^allocation \d+: size (\d+)(?:, (?!color [1-9])\w+ \d+)*, preallocated-temp"


def assigned(config, lowered: Lowered, target: devices.Target) -> Compiled:
    """Needs of the step of `config` on a TPU. `lowered` is the same step; the other process lowers it again.

    Without such dumps it takes as long as `whole`, and returns the same.
    Raises RuntimeError with the compiler's last lines, unless the program is merely too large."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="flaxkd-plan-") as scratch:
        folder = Path(scratch)
        # A reference of one key to another cannot be pickled.
        (folder / "job").write_bytes(pickle.dumps((config.copy_and_resolve_references(), target)))
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DUMPS.format(folder)}",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with (folder / "said").open("w", encoding="utf-8") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "flaxkd.plan.compiling", scratch],
                env=environment,
                stdout=said,
                stderr=said,
            )
        try:
            while process.poll() is None and not any(folder.glob(LAST)):
                time.sleep(0.2)
            ended = process.poll()
        finally:
            process.kill()
            process.wait()
        if any(folder.glob(LAST)):
            return read(folder, target, time.perf_counter() - begin)
        if ended == 0:
            return pickle.loads((folder / "result").read_bytes())
        last = "\n".join((folder / "said").read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
        raise RuntimeError(f"the compiler for {target.name} ended with status {ended}:\n{last}")


def read(folder: Path, target: devices.Target, seconds: float) -> Compiled:
    """The needs of one program according to XLA's dumps, in bytes on one device.

    Raises ValueError if a dump lacks what every training step has: another libtpu may write it otherwise."""

    def numbers(pattern: str, dump: str, what: str) -> list[int]:
        file = next(folder.glob(dump), None)
        found = re.findall(pattern, file.read_text(encoding="utf-8"), re.MULTILINE) if file else []
        if not found:
            raise unread(what, file.name if file else dump)
        return [int(x) for x in found]

    def unread(what: str, file: str) -> ValueError:
        version = next((f"libtpu {d.version}" for d in importlib.metadata.distributions(name="libtpu")), "this libtpu")
        return ValueError(
            f"{version} writes {what} of a program for {target.name} in a form that is not known here ({file}): plan "
            'with --whole, which needs no dump, or with the libtpu of pip install "flaxkd[plan]"'
        )

    needed = numbers(TOTAL, MEMORY, "the memory")[0]
    temporary = sum(numbers(TEMPORARY, BUFFERS, "the temporaries"))
    program = next(folder.glob(PROGRAM)).read_text(encoding="utf-8")
    sent = collectives(program)
    if target.count > 1 and not sent:  # gradients, at least
        raise unread("the collectives", PROGRAM)
    return Compiled(needed, temporary, None, sent, seconds)


if __name__ == "__main__":
    from flaxkd.plan import compiling  # or the other process could not unpickle the result

    jax.config.update("jax_platforms", "cpu")
    here = Path(sys.argv[1])
    job = pickle.loads((here / "job").read_bytes())
    (here / "result").write_bytes(pickle.dumps(compiling.whole(job[0], compiling.lower(*job), job[1])))
