"""One mesh and one rule. Axes: `data` splits the batch, `fsdp` splits batch, parameters and optimizer state.

It also knows the precision and the compiler's options of the present devices.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flaxkd.machine import compiler, cpu, dtypes

FSDP_MIN_SIZE = 2**20  # elements; smaller tensors cost more to gather than to keep


def compute_dtype(dtype=None) -> np.dtype:
    """A dtype, given as such or by its name; None: bfloat16 on an accelerator and float32 on a CPU.

    Raises ValueError unless it is one of dtypes.NAMES."""
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    name = dtypes.spelt(dtype if isinstance(dtype, str) else jnp.dtype(dtype).name)
    if name not in dtypes.NAMES:
        raise ValueError(f"dtype = {name!r} is unknown (known: {', '.join((*dtypes.NAMES, *dtypes.SPELLINGS))})")
    return jnp.dtype(name)


def compiler_options(platform: str | None = None, remat: bool = False) -> dict[str, object]:
    """For `jax.jit`, on "cpu", "tpu" or "gpu"; None: the present devices. Call it before anything is lowered.

    remat: whether the program recomputes parts of itself to save memory."""
    kinds = {"cpu": cpu.compiler_options, "gpu": lambda: compiler.known(compiler.REMAT_ON_GPU) if remat else {}}
    return kinds.get(platform or jax.default_backend(), dict)()


def jit(**kwargs) -> Callable:
    """A decorator: `jax.jit` with the compiler's options. They are known at the first call, when there are devices.

    Within another `jax.jit` it is the plain one: the options are those of the outermost."""

    def decorate(function):
        @functools.cache
        def program(options: bool):
            return jax.jit(function, compiler_options=compiler_options() if options else None, **kwargs)

        @functools.wraps(function)
        def call(*args, **named):
            inner = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, named)))
            return program(not inner)(*args, **named)

        return call

    return decorate


def make_mesh(data: int, fsdp: int, on: list | None = None) -> Mesh:
    """A mesh of all devices, or of those in `on`; -1 for one axis takes what the other leaves.

    Raises ValueError unless the product is the number of devices."""
    devices = jax.device_count() if on is None else len(on)
    shape = [devices // max(other, 1) if size == -1 else size for size, other in ((data, fsdp), (fsdp, data))]
    if min(data, fsdp) == max(data, fsdp) == -1 or min(shape) < 1 or shape[0] * shape[1] != devices:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} does not fit {devices} devices: their product must be {devices} "
            "(-1 takes what the other one leaves)"
        )
    # jax.make_mesh would default to explicit axis types, under which Flax's Dense raises with fsdp.
    return jax.make_mesh(tuple(shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=on)


def local_mesh() -> Mesh:
    """A mesh of this process's devices alone, for work that processes split without communication."""
    devices = np.array(jax.local_devices()).reshape(-1, 1)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put(tree, shardings):
    """Puts numpy arrays, the same in every process, on the devices. shardings: one for each leaf, or one for all.

    Unlike jax.device_put, it does not send everything to all processes to check that they agree."""
    place = lambda x, on: jax.make_array_from_callback(x.shape, on, lambda index: np.asarray(x[index]))
    return jax.tree.map(place, tree, jax.tree.broadcast(shardings, tree))


def rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch on this process's devices, ascending: int[n]. It need not read any others.

    They may have gaps: a mesh follows the wires between devices, not the hosts."""
    held = batch(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held.values()]))


def repeated(tree, mesh: Mesh):
    """A batch [n, ...], repeated until every device has as many rows; its mean stays the same. Traceable."""

    def spread(x):
        rows = np.arange(math.lcm(len(x), mesh.size)) % len(x)
        return jax.lax.with_sharding_constraint(x if len(rows) == len(x) else x[rows], batch(mesh))

    return jax.tree.map(spread, tree)


def put_rows(tree, mesh: Mesh, batch_size: int):
    """The global batch on the devices, from each process's own `rows` of it: numpy arrays [n, ...]."""
    mine = rows(mesh, batch_size)

    def place(x):
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            at = np.searchsorted(mine, start)
            return x[at : at + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), batch(mesh), shard)

    return jax.tree.map(place, tree)


def whole(tree, mesh: Mesh):
    """A tree of arrays on the devices as numpy arrays, complete in every process."""
    if all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.device_get(jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree))


def params(mesh: Mesh, tree):
    """A sharding per leaf: `fsdp` splits the largest divisible axis of a large tensor; others are replicated.

    tree: anything whose leaves have `.shape`: parameters, optimizer state, EMA, a whole training state."""

    def rule(x):
        fsdp = mesh.shape["fsdp"]
        if np.prod(x.shape, dtype=int) < FSDP_MIN_SIZE or fsdp == 1:
            return replicated(mesh)
        divisible = [axis for axis, size in enumerate(x.shape) if size % fsdp == 0]
        if not divisible:
            return replicated(mesh)
        axis = max(divisible, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(rule, tree)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int) -> None:
    """Raises ValueError unless every device gets the same whole number of images at each accumulation step."""
    devices = mesh.size
    if accumulate < 1 or batch_size % (devices * accumulate):
        raise ValueError(
            f"batch_size = {batch_size} images cannot be split over {devices} devices x {accumulate} accumulation "
            f"steps: make it a multiple of {devices * max(accumulate, 1)}"
        )
