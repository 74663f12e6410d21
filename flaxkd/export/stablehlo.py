"""A pipeline as programs of `jax.export` (StableHLO), for JAX without flaxkd.

A folder of PROGRAM.jax_export, the parameters beside them, tokenizers, and programs.json, which says what each program
takes. The batch is symbolic, the size of the pictures is not. docs/export.md has the loader.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

import flaxkd
from flaxkd.diffusion import samplers, sampling
from flaxkd.machine import cpu, files
from flaxkd.models import attention
from flaxkd.pretrained import Folder
from flaxkd.pretrained.writing import write_padding_tokenizer
from flaxkd.weights import quantize

PLATFORMS = ("cpu", "cuda", "tpu")
SPEC = "programs.json"
NEGATIVE = "negative_"  # before the name of an input: the same of what not to draw


@dataclasses.dataclass(frozen=True)
class AttentionAnywhere:
    """`DotProductAttention` of a program that does not know its platform yet: both forms are in it, XLA keeps one.

    Kernels are left out: a file would not outlive the version of cuDNN or of Mosaic that it was written with."""

    def __call__(self, query, key, value, *, upcast: bool = False, mask=None) -> jax.Array:
        plain = functools.partial(attention.plain, upcast=upcast)
        name = attention.choose("cpu", query.dtype, query.shape[1], key.shape[1], query.shape[-1])
        if mask is not None or name == "plain":
            return plain(query, key, value, mask=mask)
        on_cpu = functools.partial(attention.FORMS[name], upcast=upcast)
        return jax.lax.platform_dependent(query, key, value, cpu=on_cpu, default=plain)


class Program(NamedTuple):
    """function(params {part: tree}, inputs {name: array}); inputs: {name: its shape, without the batch}."""

    function: Callable[[dict, dict], Any]
    parts: tuple[str, ...]
    inputs: Mapping[str, jax.ShapeDtypeStruct]


class Settings(NamedTuple):
    """What is fixed in the loop from text to image; None: as `flaxkd.Pipeline` has it."""

    height: int | None = None
    width: int | None = None
    steps: int | None = None
    sampler: str | None = None
    guidance: float | None = None  # 1: none, at half the compute. Any other one is an input, and this its default


AS_IT_IS = Settings()


def write(out: Path, folder: Folder, settings: Settings = AS_IT_IS, dtype=jnp.float32) -> dict[str, int]:
    """Writes all programs of a pipeline to a new folder `out`; returns {file: bytes}.

    dtype: of parameters and compute. Raises ValueError for an inpainting model, if `out` is in use, and as
    `samplers.schedule` and `Folder.check_resolution` do; ImportError without flatbuffers. All before any compute."""
    from jax import export

    try:
        import flatbuffers  # noqa: F401, jax.export asks for it at the very end
    except ImportError:
        raise ImportError('jax.export needs the package flatbuffers: pip install "flaxkd[stablehlo]"') from None
    out = Path(out).absolute()
    files.check_replaceable(out, (out / SPEC).is_file(), f"to {SPEC}")
    found, defaults, about = programs(folder, settings, dtype)
    shapes = {part: folder.shapes(part) for part in folder.parts}
    (b,) = export.symbolic_shape("b")
    batched = lambda x: jax.ShapeDtypeStruct((b, *x.shape), x.dtype)
    describe = lambda tree: jax.tree.map(lambda x: f"{x.dtype}[{', '.join(map(str, x.shape))}]", tree)
    options = cpu.compiler_options()  # and the convolutions of small maps for a CPU, whatever this machine is
    rows = {}
    with files.whole_folder(out) as new:
        for name, program in found.items():
            given = {part: _flat(shapes[part], folder.dtype(part, dtype)) for part in program.parts}
            inputs = {each: batched(x) for each, x in program.inputs.items()}
            made = export.export(jax.jit(_of_flat(program)), platforms=PLATFORMS)(given, inputs)
            (new / f"{name}.jax_export").write_bytes(made.serialize())
            rows[name] = {
                "file": f"{name}.jax_export",
                "params": [*program.parts],
                "inputs": describe(inputs),
                "outputs": describe(jax.tree.unflatten(made.out_tree, made.out_avals)),
            }
        for part in folder.parts:
            save_file(flatten_dict(folder.params(part, dtype), sep="/"), new / f"{part}.safetensors")
        about |= {
            "programs": rows,
            "params": {part: f"{part}.safetensors" for part in folder.parts},
            "defaults": defaults,
            "tokenizers": {field: write_padding_tokenizer(folder, field, new) for field in folder.tokenizers},
            "dtype": jnp.dtype(dtype).name,
            "platforms": [*PLATFORMS],
            "compiler_options": {"cpu": options},
            "jax": jax.__version__,
            "flaxkd": flaxkd.__version__,
            "calling_convention_version": made.calling_convention_version,
        }
        files.write_json(new / SPEC, about)
    return {path.name: path.stat().st_size for path in sorted(out.iterdir())}


def programs(folder: Folder, settings: Settings, dtype) -> tuple[dict[str, Program], dict, dict]:
    """(all programs by name, {input: its value for a picture where nothing is asked for}, what is fixed in them)."""
    if folder.beside:
        raise ValueError(f"{folder.path} is an inpainting model: text-to-image models are exported alone")
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    scheduler, (height, width) = folder.config("scheduler"), folder.picture_size(settings.height, settings.width)
    sampler = settings.sampler or samplers.own(scheduler)
    steps = samplers.usual_steps(sampler, scheduler) if settings.steps is None else settings.steps
    schedule = samplers.schedule(sampler, scheduler, steps)
    guidance = folder.guidance if settings.guidance is None else settings.guidance

    attend = {"unet": {"attend": AttentionAnywhere()}}
    modules = {part: folder.module(part, dtype, **attend.get(part, {})) for part in folder.parts}
    modules["unet"] = quantize.wrapped(modules["unet"], folder.shapes("unet"), folder.quantization)
    modules = FrozenDict(modules)
    condition, vae, channels = folder.family.condition, modules["vae"], modules["unet"].config.time_cond_proj_dim
    ids = folder.conditions([None], (height, width))
    prompt = {name: of(*x.shape[1:], dtype=x.dtype) for name, x in ids.items()}
    latents = of(height // folder.factor, width // folder.factor, vae.config.latent_channels)
    states = _states(folder, modules, prompt)
    if channels is not None:
        states["timestep_cond"] = of(channels)

    def unet(params, inputs):
        named = {name: inputs[name] for name in states}
        return modules["unet"].apply({"params": params["unet"]}, inputs["latents"], inputs["timesteps"], **named)

    inputs = prompt | {"latents": latents}
    alone = channels is not None or guidance <= 1
    if not alone:
        inputs |= {f"{NEGATIVE}{name}": x for name, x in prompt.items()}
    if channels is not None or not alone:
        inputs["guidance"] = of()
    if schedule.noise is not None:
        inputs["noise"] = of(len(schedule.noise), *latents.shape)

    def text_to_image(params, inputs):
        noise = inputs.get("noise")
        return sampling.text_to_image(
            modules,
            condition,
            params,
            {name: inputs[name] for name in prompt},
            {} if alone else {name: inputs[f"{NEGATIVE}{name}"] for name in prompt},
            inputs["latents"],
            schedule,
            inputs.get("guidance"),
            noise=None if noise is None else jnp.swapaxes(noise, 0, 1),
            scan=True,
        )

    found = {
        "condition": Program(lambda p, x: condition(modules, p, x), folder.family.encoders, prompt),
        "unet": Program(unet, ("unet",), {"latents": latents, "timesteps": of(), **states}),
        "decode": Program(lambda p, x: sampling.decode(vae, p["vae"], x["latents"]), ("vae",), {"latents": latents}),
        "encode": Program(
            lambda p, x: sampling.image_to_latents(vae, p["vae"], x["images"]),
            ("vae",),
            {"images": of(height, width, 3)},
        ),
        "text_to_image": Program(text_to_image, folder.parts, inputs),
    }
    usual = {**ids, **{f"{NEGATIVE}{name}": x for name, x in ids.items()}, "guidance": np.array([max(guidance, 1)])}
    defaults = {name: x[0].tolist() for name, x in usual.items() if name in inputs}
    fixed = {"height": height, "width": width, "steps": steps, "sampler": sampler}
    return found, defaults, fixed


def _states(folder: Folder, modules: Mapping, prompt: Mapping) -> dict[str, jax.ShapeDtypeStruct]:
    """The keyword arguments of its UNet for one picture, without the batch."""
    params = {part: folder.shapes(part) for part in folder.family.encoders}
    one = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in prompt.items()}
    made = jax.eval_shape(functools.partial(folder.family.condition, modules), params, one)
    return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in made.items()}


def _flat(tree: dict, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape}, as in the file of the parameters."""
    return {path: jax.ShapeDtypeStruct(x.shape, dtype) for path, x in flatten_dict(tree, sep="/").items()}


def _of_flat(program: Program) -> Callable[[dict, dict], Any]:
    """The same function of params {part: {path: array}}."""
    return lambda params, inputs: program.function(
        {part: unflatten_dict(tensors, sep="/") for part, tensors in params.items()}, inputs
    )
