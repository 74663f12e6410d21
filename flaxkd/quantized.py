"""What does it cost to quantize a model? Errors of its predictions under each scheme, on held-out captions.

    python -m flaxkd.quantized --model runs/small [--model runs/quantize ...] [--scheme w4 ...] [--out quantized]

A model that was trained in full precision is rounded by every --scheme, after training (PTQ). One that was trained
quantized (QAT) is computed as it was trained, and once in full precision. All predictions are for the same noisy
latents. The table has, for each of them, the relative error (the root of the mean square of the difference, over that
of the prediction) against the model's own in full precision, and against the first --model's; loss_output, the mean
square of the difference to the --teacher's; loss_noise; and the size of the UNet's file.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.core import FrozenDict

from flaxkd import diffusion
from flaxkd.data import sources
from flaxkd.diffusion import samplers
from flaxkd.drawing import batches, grids
from flaxkd.evaluate import candidates, results
from flaxkd.evaluate.candidates import Candidate
from flaxkd.machine import command, progress, sharding
from flaxkd.models.vae import sample_latents
from flaxkd.tasks.losses import predict
from flaxkd.weights import quantize
from flaxkd.weights.quantize import Quantization

STEPS = 15  # of the pictures
FULL = "full"  # the scheme of full precision


class Seen(NamedTuple):
    """What all networks predict for."""

    captions: list[str]
    noisy_latents: np.ndarray  # float32[n, h, w, c]
    timesteps: np.ndarray  # int32[n]
    target: np.ndarray  # float32[n, h, w, c]
    noise: np.ndarray  # float32[n, h, w, c], to draw from


def run(args: argparse.Namespace) -> list[dict]:
    """The rows of the table, written to `args.out`. Raises ValueError and FileNotFoundError before any compute."""
    if args.examples < 1 or not 0 <= args.pictures <= args.examples:
        raise ValueError(
            f"--examples {args.examples} must be at least 1, and --pictures {args.pictures} from 0 to that"
        )
    mesh, dtype = sharding.local_mesh(), sharding.compute_dtype(args.dtype)
    sharding.check_batch(mesh, args.batch_size, 1)
    teacher, models = candidates.find(args.teacher), []
    for model in args.models:
        found = candidates.find(model, tuple(m.name for m in models))
        candidates.check(found, teacher)
        schemes_of(found, args)
        if found.folder.beside:
            raise ValueError(
                f"{found.name} is for inpainting: flaxkd.evaluate measures such a model as it is drawn with"
            )
        models.append(found)
    latents, resolution = candidates.sizes(teacher, args.resolution)
    source = sources.open_source(args.data, "validation", resolution=resolution)
    chosen = sources.readable(source, range(min(args.examples, len(source))))
    teacher = candidates.load(teacher, dtype, mesh)
    seen = see(teacher, [source[i] for i in chosen], latents, args, mesh)
    wanted, rows, reference = predictions(teacher, seen, resolution, args.batch_size, mesh), [], None
    drawn = {"teacher": draw(teacher, seen, args)}
    asked = sum(len(schemes_of(model, args)) for model in models)
    with progress.Bar(asked, "quantized", " rows", first=progress.COMPILING) as bar:
        for model in models:
            own = None
            for scheme, network in variants(model, args, dtype, mesh):
                said = predictions(network, seen, resolution, args.batch_size, mesh)
                own = said if own is None else own
                reference = said if reference is None else reference
                row = {"model": model.name, "scheme": scheme, "to_itself": relative(said, own)}
                row |= {"to_first": relative(said, reference), "loss_output": square(said, wanted)}
                row |= {"loss_noise": square(said, seen.target), "bytes": size(model, scheme, args)}
                rows.append(row)
                if scheme != FULL or not model.folder.quantization:  # nobody draws with what is meant to be rounded
                    drawn[f"{model.name}, {scheme}"] = draw(network, seen, args)
                bar.update()
    about = {"examples": len(chosen), "data": args.data, "seed": args.seed, "dtype": dtype.name}
    draw_sheet = lambda path: grids.grid(drawn, seen.captions[: args.pictures], path)
    numbers = about | {"teacher": args.teacher, "rows": rows}
    results.report(args.out, "quantized", table(rows), numbers, draw_sheet if args.pictures else None)
    return rows


def see(teacher: Candidate, examples: list[dict], latents: tuple, args: argparse.Namespace, mesh) -> Seen:
    images = np.stack([example["image"] for example in examples])
    moments = candidates.encode(teacher, images, args.batch_size, mesh, "held out")["moments"]
    rng, n = np.random.default_rng(args.seed), len(images)
    schedule = diffusion.NoiseSchedule.from_config(teacher.folder.config("scheduler"))
    sampled, noise = rng.standard_normal((2, n, *latents), np.float32)
    clean = np.asarray(sample_latents(sampled, moments, teacher.folder.scaling_factor))
    timesteps = rng.integers(0, len(schedule.alphas_cumprod), n).astype(np.int32)
    noisy_latents = np.asarray(diffusion.add_noise(schedule, clean, noise, timesteps))
    target = np.asarray(diffusion.target(schedule, clean, noise, timesteps))
    return Seen([example["caption"] for example in examples], noisy_latents, timesteps, target, noise)


def schemes_of(model: Candidate, args: argparse.Namespace) -> dict[str, Quantization | None]:
    """{name: how the UNet is quantized} of a model's rows, full precision first.

    Raises ValueError for a layer in --full-precision that its UNet lacks."""
    own = model.folder.quantization
    if own and own.on_grid:
        return {f"{own.scheme}, rounded": None}
    hows = [own] if own else [Quantization(scheme, tuple(args.full)) for scheme in args.schemes]
    for how in hows:
        quantize.layers(model.folder.shapes("unet"), how)
    return {FULL: None} | {how.scheme: how for how in hows}


def variants(model: Candidate, args: argparse.Namespace, dtype, mesh) -> Iterator[tuple[str, Candidate]]:
    """(name, the model so quantized). Rounded weights alone need no other program than full precision."""
    plain = candidates.load(model._replace(folder=model.folder.as_quantized(None)), dtype, mesh)
    unet, params = plain.pipeline.modules["unet"], plain.pipeline.params["unet"]
    for name, how in schemes_of(model, args).items():
        parts = {}, {}
        if how and quantize.SCHEMES[how.scheme].activations:
            parts = {"unet": quantize.wrapped(unet, params, how)}, {}
        elif how:
            rounded = quantize.on_grid(jax.device_get(params), how)
            parts = {}, {"unet": sharding.put(rounded, sharding.replicated(mesh))}
        yield name, plain._replace(pipeline=plain.pipeline.with_parts(*parts))


@sharding.jit(static_argnames=("modules", "condition"))
def _predict(modules, condition, params, inputs, noisy_latents, timesteps):
    seen = condition(modules, params, inputs)
    return predict(modules["unet"], params["unet"], noisy_latents, timesteps, seen).noise_pred.astype(np.float32)


def predictions(model: Candidate, seen: Seen, resolution: int, batch_size: int, mesh) -> np.ndarray:
    """noise_pred float32[n, h, w, c]."""
    network, n, found = candidates.network(model, seen.captions, resolution, {}), len(seen.captions), []
    for start in range(0, n, batch_size):
        here = np.arange(start, start + batch_size).clip(max=n - 1)  # the last batch is padded
        put = lambda x, here=here: jax.device_put(x[here], sharding.batch(mesh))
        inputs, latents, timesteps = jax.tree.map(put, (network.inputs, seen.noisy_latents, seen.timesteps))
        said = _predict(FrozenDict(network.modules), network.condition, network.params, inputs, latents, timesteps)
        found.append(np.asarray(said))
    return np.concatenate(found)[:n]


def draw(model: Candidate, seen: Seen, args: argparse.Namespace) -> np.ndarray | None:
    """Pictures uint8[n, H, W, 3] of the first captions, each from its own noise; None for none."""
    if not args.pictures:
        return None
    schedule = samplers.schedule("dpmsolver++", model.folder.config("scheduler"), STEPS)
    drawn = batches.draw(
        model.pipeline,
        seen.captions[: args.pictures],
        lambda i: (seen.noise[i], None),
        schedule,
        model.folder.guidance,
        batch_size=args.pictures,
    )
    return np.stack(list(drawn))


def square(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.square(a.astype(np.float64) - b).mean())


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(square(a, b) / np.square(b.astype(np.float64)).mean()))


def size(model: Candidate, scheme: str, args: argparse.Namespace) -> int:
    how = model.folder.quantization or schemes_of(model, args)[scheme]
    return quantize.size(model.folder.shapes("unet"), None if scheme == FULL else how)


def table(rows: list[Mapping]) -> str:
    lines = ["| model | scheme | error to itself | error to the first | loss_output | loss_noise | MB |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for row in rows:
        errors = [f"{row[name]:.2%}" if row[name] else "0" for name in ("to_itself", "to_first")]
        losses = [f"{row[name]:.5f}" for name in ("loss_output", "loss_noise")]
        cells = [row["model"], row["scheme"], *errors, *losses, f"{row['bytes'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.quantized", __doc__)
    models = f"{command.MODEL}; repeat for several"
    command.add(parser, "model", dest="models", action=command.Several, required=True, help=models)
    command.add(parser, "teacher")
    known = [*quantize.SCHEMES]
    schemes = "of models that were trained in full precision; repeat for several; default: all"
    parser.add_argument("--scheme", dest="schemes", action=command.Several, choices=known, default=known, help=schemes)
    full = "ends of names of layers in full precision there; repeat for several; default: those of configs/default.py"
    parser.add_argument(
        "--full-precision", dest="full", action=command.Several, metavar="NAME", default=quantize.FULL, help=full
    )
    parser.add_argument("--data", default="openmoji", help="'openmoji' or a folder of pictures with metadata.jsonl")
    parser.add_argument("--examples", type=int, default=128, help="held-out captions (default: %(default)s)")
    parser.add_argument("--resolution", type=int, help="pixels; default: the teacher's")
    parser.add_argument("--pictures", type=int, default=0, help="captions to draw; default: none")
    command.add(parser, "seed")
    command.add(parser, "batch-size", default=16)
    command.add(parser, "dtype")
    command.add(parser, "out", default=Path("quantized"), help="result folder; default: %(default)s")
    args = parser.parse_args(arguments)
    command.keep_compiled_programs()
    run(args)


if __name__ == "__main__":
    main()
