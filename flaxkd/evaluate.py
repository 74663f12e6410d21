"""How good are students? One table, the teacher first: fidelity to the teacher, and the published protocol.

    python -m flaxkd.evaluate --model DIR|HUB_ID|WORKDIR ... [--reference DIR|HUB_ID|WORKDIR] [--out DIR]
    python -m flaxkd.evaluate --model ... --prompts FILE --real DIR|FILE.npz [--inception FILE] [--clip DIR|HUB_ID]

The first measures on held-out captions, with equal noise for all: see fidelity.py. With --prompts, pictures are drawn
from every prompt as BK-SDM did, and scored with FID, inception score and CLIP score: see protocol.py. Pictures that
are there are kept, so that the same command goes on where it stopped.
"""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxkd import (
    candidate,
    card,
    command,
    diffusion,
    fidelity,
    gallery,
    hosts,
    pictures,
    protocol,
    sampling,
    sharding,
    table,
)
from flaxkd.candidate import Candidate
from flaxkd.data import prompts as prompts_file
from flaxkd.data import sources
from flaxkd.models.vae import sample_latents

SHOWN = 8  # prompts in samples.png


class Setup(NamedTuple):
    """What all models are measured with."""

    args: argparse.Namespace
    mesh: Any  # of this process's devices
    dtype: Any  # of the compute
    latents: tuple[int, int, int]  # h, w, c
    resolution: int  # pixels
    samplers: dict[str, str]  # of "fidelity" and "protocol", as far as they are asked for


def run(args: argparse.Namespace) -> dict:
    """Measures what is asked, writes it into `args.out`, and returns it: see `table.write`.

    Raises ValueError, FileNotFoundError and ModuleNotFoundError before any compute."""
    if not args.fidelity and args.prompts is None:
        raise ValueError("--no-fidelity leaves the published protocol, which needs --prompts FILE")
    models = [candidate.find(args.reference)]
    models[0] = models[0]._replace(name=f"teacher ({models[0].name})")
    for model in args.models:
        models.append(candidate.find(model, tuple(m.name for m in models)))
    setup, settings = prepare(args, models)
    notes: list[str] = []
    if args.fidelity:
        held = hold_out(setup, models, settings, notes)
    if args.prompts is not None:
        prompts = prompts_file.read(args.prompts, args.limit)
        settings["prompts"] = f"{len(prompts)} of {args.prompts}"
        scorer = None
        if jax.process_index() == 0:  # which alone scores: the others need no room for the networks
            scorer = protocol.open_scorer(args.inception, args.clip, args.real)
            settings |= scorer.settings
        other = protocol.departures(
            setup.samplers["protocol"], args.steps, args.guidance, setup.resolution, len(prompts)
        )
        notes += [f"Not as published: {other}."] if other else []
    args.out.mkdir(parents=True, exist_ok=True)

    rows = [{"model": model.name, "parameters": card.parameters("unet", model.configs["unet"])} for model in models]
    written = []
    if args.fidelity and jax.process_index() == 0:
        written.append(measure_fidelity(setup, models, held, rows))
    if args.prompts is not None:
        measure_protocol(setup, models, prompts, scorer, rows)
    if jax.process_index() > 0:  # the first process has everything
        return {}
    result = {"settings": settings, "notes": notes, "rows": rows}
    written += table.write(args.out, result)
    print(table.markdown(result).partition("\n## ")[0])
    print("\n".join(f"wrote {path}" for path in written))
    return result


def prepare(args: argparse.Namespace, models: list[Candidate]) -> tuple[Setup, dict]:
    """The setup, and the settings {name: value} that go with the result. Raises ValueError for what does not fit."""
    mesh = sharding.local_mesh()
    sharding.check_batch(mesh, args.batch_size, 1)
    dtype = sharding.compute_dtype(args.dtype)
    latents, resolution = candidate.sizes(models[0], args.resolution)
    samplers = {"fidelity": args.sampler or "dpmsolver++"} if args.fidelity else {}
    samplers |= {"protocol": args.sampler or protocol.SAMPLER} if args.prompts else {}
    for model in models:
        for kind in samplers.values():
            sampling.plan(kind, model.configs["scheduler"], args.steps)
    settings = {
        "teacher": str(args.reference or "the embedded miniature"),
        "models": ", ".join(args.models),
        "resolution": f"{resolution} pixels",
        **{f"sampler ({what})": kind for what, kind in samplers.items()},
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "batch size": args.batch_size,
        "dtype": dtype.name,
        "machine": f"{jax.process_count()} x {mesh.size} x {jax.local_devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    return Setup(args, mesh, dtype, latents, resolution, samplers), settings


def draw(setup: Setup, model: Candidate, what: str, prompts: list[str], **options) -> list[Path]:
    """Draws what is missing of the pictures of a loaded model for "fidelity" or "protocol"; the paths of all."""
    args = setup.args
    plan = sampling.plan(setup.samplers[what], model.configs["scheduler"], args.steps)
    settings = {"weights": model.fingerprint, "sampler": setup.samplers[what], "steps": args.steps}
    settings |= {"guidance": args.guidance, "resolution": setup.resolution, "dtype": setup.dtype.name}
    return gallery.draw(
        args.out / "pictures" / what / re.sub(r"[^\w.-]+", "-", model.name).strip("-"),
        prompts,
        candidate.drawer(model, plan, args.guidance, setup.mesh),
        settings=settings,
        latents=setup.latents,
        seed=args.seed,
        batch_size=args.batch_size,
        desc=f"{what}: drawing, {model.name}",
        **options,
    )


class HeldOut(NamedTuple):
    """Pictures and captions that no training saw, and what is compared on them."""

    captions: list[str]
    images: np.ndarray  # uint8[n, H, W, 3]
    schedule: diffusion.NoiseSchedule
    pairs: list[tuple]  # of features, by model


def hold_out(setup: Setup, models: list[Candidate], settings: dict, notes: list[str]) -> HeldOut:
    """Opens the validation split, and finds what each model is to the teacher. Raises ValueError if it is nothing."""
    args, teacher = setup.args, models[0]
    schedule = diffusion.NoiseSchedule.from_config(teacher.configs["scheduler"])
    edges = fidelity.timestep_bins(len(schedule.alphas_cumprod), args.bins)
    pairs: list[tuple] = [()]
    for model in models[1:]:
        candidate.check(model, teacher)
        kind, found = fidelity.relation(model.configs["unet"], teacher.configs["unet"], args.pairing)
        pairs.append(found)
        settings[f"{model.name} is"] = kind or "another network"
        if kind is None:
            notes.append(f"{model.name} is no student of {teacher.name}: features are not compared.")
    source = sources.open_source(args.data, "validation", resolution=setup.resolution)
    n = min(args.examples, len(source))
    if n < 2:
        raise ValueError(f"{n} held-out pictures ({args.data}, --examples {args.examples}): 2 are needed")
    settings |= {"data": f"{n} held-out pictures of {args.data}", "pairing": args.pairing}
    settings["timesteps"] = edges.tolist()
    examples = [source[i] for i in range(n)]
    images = np.stack([example["image"] for example in examples])
    return HeldOut([example["caption"] for example in examples], images, schedule, pairs)


def measure_fidelity(setup: Setup, models: list[Candidate], held: HeldOut, rows: list[dict]) -> Path:
    """Adds what fidelity.py measures to the rows, the teacher's first; writes samples.png and returns its path."""
    args, mesh = setup.args, setup.mesh
    teacher = candidate.load(models[0], setup.dtype, mesh)
    scaling_factor = teacher.modules["vae"].config.scaling_factor
    moments = candidate.encode(teacher, held.images, args.batch_size, mesh)
    noise = np.random.default_rng(args.seed).standard_normal((len(moments), *setup.latents), np.float32)
    latents = np.asarray(sample_latents(noise, moments, scaling_factor))
    features = lambda moments: fidelity.latent_features(np.split(moments, 2, axis=-1)[0] * scaling_factor)
    drawn, network, of_teacher = {}, candidate.network(teacher, held.captions), None
    for found, pairs, row in zip(models, held.pairs, rows, strict=True):
        first = found is models[0]
        model = teacher if first else candidate.load(found, setup.dtype, mesh)
        paths = draw(setup, model, "fidelity", held.captions)
        drawn[model.name] = images = np.stack([gallery.read(path) for path in paths])
        own = features(candidate.encode(teacher, images, args.batch_size, mesh))
        row["frechet_latent_data"] = fidelity.frechet(own, features(moments))
        if first:
            of_teacher, of_images = own, images
            continue
        row["psnr"] = float(fidelity.psnr(images, of_images).mean())
        row["ssim"] = float(fidelity.ssim(images, of_images).mean())
        row["frechet_latent"] = fidelity.frechet(own, of_teacher)
        values = fidelity.errors(
            candidate.network(model, held.captions),
            network,
            latents,
            held.schedule,
            pairs,
            bins=args.bins,
            seed=args.seed,
            batch_size=args.batch_size,
            mesh=mesh,
            desc=f"fidelity: errors, {model.name}",
        )
        row |= fidelity.summary(values)
        rows[0] |= fidelity.summary(values, "teacher/")
        del model  # before the next one is there: at full size it is gigabytes of the device
    path = args.out / "samples.png"
    pictures.grid({name: images[:SHOWN] for name, images in drawn.items()}, held.captions[:SHOWN], path)
    return path


def measure_protocol(setup: Setup, models: list[Candidate], prompts, scorer, rows: list[dict]) -> None:
    """Draws this process's share of the pictures; the first process then waits for the others, and adds the scores."""
    args, size = setup.args, protocol.SIZE
    shared = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    paths = []
    for found in models:
        model = candidate.load(found, setup.dtype, setup.mesh)
        paths.append(draw(setup, model, "protocol", prompts, size=size, suffix=protocol.SUFFIX, **shared))
        del model
    hosts.wait("drawn")
    if jax.process_index() > 0:
        return
    read = lambda path: gallery.read(path, size)
    scorer = protocol.real_statistics(scorer, read, args.batch_size, args.out / "real.npz")
    for row, drawn in zip(rows, paths, strict=True):
        row |= protocol.score(scorer, drawn, prompts, read, args.batch_size, row["model"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flaxkd.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    model = "pipeline folder, hub id, or workdir of a training (its export, else its newest checkpoint)"
    rows = f"{model}; several make several rows"
    add("--model", dest="models", action="extend", nargs="+", required=True, help=rows)
    add("--reference", help=f"the teacher: {model}; default: the embedded miniature")
    add("--out", type=Path, default=Path("evaluation"), help="folder of the result (default: %(default)s)")
    add("--steps", type=int, default=protocol.STEPS, help="of the sampler (default: %(default)s)")
    add("--guidance", type=float, default=protocol.GUIDANCE, help="default: %(default)s")
    add("--sampler", help="default: dpmsolver++ for fidelity, pndm for the protocol")
    add("--resolution", type=int, help="pixels (default: what the teacher was made for)")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=16, help="pictures at once, over the devices of a process")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16, float32 on a CPU")
    hosts.add_arguments(parser)
    of = parser.add_argument_group("fidelity to the teacher")
    of.add_argument("--fidelity", action=argparse.BooleanOptionalAction, default=True)
    of.add_argument(
        "--data", default="openmoji", help="'openmoji' or a folder of pictures with metadata.jsonl"
    )
    of.add_argument("--examples", type=int, default=128, help="held-out captions (default: %(default)s)")
    of.add_argument("--bins", type=int, default=10, help="ranges of timesteps (default: %(default)s)")
    of.add_argument("--pairing", choices=["segmind", "bksdm"], default="segmind", help="feature pairs")
    of = parser.add_argument_group("published protocol (needs the extra eval)")
    of.add_argument("--prompts", type=Path, help=".txt (a prompt a line) or .csv (a column text)")
    of.add_argument("--limit", type=int, help="take the first so many prompts")
    of.add_argument(
        "--real", type=Path, help="folder of real pictures, or .npz with mu and sigma; without: no FID"
    )
    of.add_argument(
        "--inception", type=Path, help="InceptionV3 weights of torch-fidelity (default: downloaded)"
    )
    of.add_argument("--clip", default=protocol.CLIP, help="CLIP of transformers (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    command.keep_compiled_programs()
    with hosts.together(args), command.told(ValueError, FileNotFoundError, ModuleNotFoundError):
        run(args)


if __name__ == "__main__":
    main()
