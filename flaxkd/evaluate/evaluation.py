"""How good are the students? One table, teacher first: fidelity to the teacher, and the published protocol.

    python -m flaxkd.evaluate --model DIR|HUB_ID|WORKDIR ... [--teacher DIR|HUB_ID|WORKDIR] [--out DIR]
    python -m flaxkd.evaluate --model ... --prompts FILE --real DIR|FILE.npz [--inception FILE] [--clip DIR|HUB_ID]
    python -m flaxkd.evaluate --model ... --prompts FILE --subject DIR [--dino DIR|HUB_ID] [--clip DIR|HUB_ID]

Fidelity is measured on held-out captions, with equal noise for all models: see fidelity.py. With --prompts, a picture
is drawn from every prompt as in BK-SDM, and scored with FID, inception score and CLIP score: see scores.py; with
--subject, by how like a subject it is: see subject.py. Finished pictures are reused: the same command resumes.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxkd import diffusion, students
from flaxkd.data import encoding, sources
from flaxkd.data import prompts as prompts_file
from flaxkd.diffusion import samplers
from flaxkd.drawing import batches, grids, resumable
from flaxkd.evaluate import candidates, fidelity, results, scores, subject, table
from flaxkd.evaluate.candidates import Candidate
from flaxkd.machine import command, hosts, sharding
from flaxkd.models.vae import sample_latents
from flaxkd.tasks import inputs

SHOWN = 8  # prompts in samples.png


class Setup(NamedTuple):
    """The settings shared by all measurements."""

    args: argparse.Namespace
    mesh: Any  # of this process's devices
    dtype: Any  # of the compute
    latents: tuple[int, int, int]  # h, w, c
    resolution: int  # pixels
    drawn_with: dict[str, tuple[str, float]]  # sampler and guidance of "fidelity" and "protocol", see `how`


def run(args: argparse.Namespace) -> dict:
    """Runs the requested measurements, writes the result to `args.out` and returns it: see `table.write`.

    Raises ValueError, FileNotFoundError and ModuleNotFoundError before any compute."""
    if not args.fidelity and args.prompts is None:
        raise ValueError("--no-fidelity leaves the published protocol, which needs --prompts FILE")
    models = [candidates.find(args.teacher, vae=args.vae, clip_skip=args.clip_skip)]
    models[0] = models[0]._replace(name=f"teacher ({models[0].name})")
    for model in args.models:
        models.append(candidates.find(model, tuple(m.name for m in models), args.vae))
    setup, settings = prepare(args, models)
    models = candidates.anchored(models) if args.as_cut else models
    notes: list[str] = []
    if args.fidelity:
        held = hold_out(setup, models, settings, notes)
    if args.prompts is not None:
        prompts = prompts_file.read(args.prompts, args.limit)
        settings["prompts"] = f"{len(prompts)} of {args.prompts}"
        scorer = likeness = None
        if jax.process_index() == 0:  # it alone scores: the others need no memory for the networks
            scorer = scores.open_scorer(args.inception, args.clip, args.real, bool(args.subject) and args.real is None)
            settings |= scorer.settings
            if args.subject is not None:
                likeness = subject.open_subject(args.subject, args.dino, scorer.clip)
                settings |= {"subject": str(args.subject), "DINO": args.dino}
        sampler, guidance = setup.drawn_with["protocol"]
        other = scores.departures(sampler, args.steps or samplers.STEPS, guidance, setup.resolution, len(prompts))
        notes += [f"Not as published: {other}."] if other else []
        few = scores.too_few(len(prompts))
        notes += [f"{few[0].upper()}{few[1:]}."] if few else []
    args.out.mkdir(parents=True, exist_ok=True)

    rows = [{"model": model.name, "parameters": model.folder.count("unet")} for model in models]
    for row, model in zip(rows, models, strict=True):
        row |= {"as_cut": True} if model.as_cut else {}
    written = []
    if args.fidelity and jax.process_index() == 0:
        written.append(measure_fidelity(setup, models, held, rows))
    if args.prompts is not None:
        measure_protocol(setup, models, prompts, scorer, likeness, rows)
    if jax.process_index() > 0:  # the first process has everything
        return {}
    result = {"settings": settings, "notes": notes, "rows": rows}
    written += table.write(args.out, result)
    print(table.markdown(result).partition("\n## ")[0])
    print(results.said(written))
    return result


def prepare(args: argparse.Namespace, models: list[Candidate]) -> tuple[Setup, dict]:
    """The setup, and the settings {name: value} to report. Raises ValueError for settings that do not fit a model."""
    mesh = sharding.local_mesh()
    sharding.check_batch(mesh, args.batch_size, 1)
    dtype = sharding.compute_dtype(args.dtype)
    latents, resolution = candidates.sizes(models[0], args.resolution)
    teacher, drawn_with = models[0].folder, {}
    if args.fidelity:
        drawn_with["fidelity"] = args.sampler or samplers.own(teacher.config("scheduler")), teacher.guidance
    if args.prompts is not None:
        drawn_with["protocol"] = args.sampler or scores.SAMPLER, scores.GUIDANCE
    if args.guidance is not None:
        drawn_with = {what: (kind, args.guidance) for what, (kind, _) in drawn_with.items()}
    few = {}
    for model in models:
        for shared in drawn_with.values():
            kind, steps, guidance = how(args, model, shared)
            samplers.schedule(kind, model.folder.config("scheduler"), steps)
            if steps != (args.steps or samplers.STEPS):
                few[f"drawn in few steps ({model.name})"] = f"{steps} of {kind}, guidance {guidance:g}"
    settings = {
        "teacher": str(args.teacher or "the embedded miniature"),
        **({"clip skip of the teacher": args.clip_skip} if args.clip_skip else {}),
        "models": ", ".join(args.models),
        "resolution": f"{resolution} pixels",
        **{f"sampler ({what})": kind for what, (kind, _) in drawn_with.items()},
        "steps": args.steps or samplers.STEPS,
        **few,
        **{f"guidance ({what})": guidance for what, (_, guidance) in drawn_with.items()},
        "seed": args.seed,
        "batch size": args.batch_size,
        "dtype": dtype.name,
        "machine": f"{jax.process_count()} x {mesh.size} x {jax.local_devices()[0].device_kind}",
        "jax": jax.__version__,
    }
    return Setup(args, mesh, dtype, latents, resolution, drawn_with), settings


def how(args: argparse.Namespace, model: Candidate, shared: tuple[str, float]) -> tuple[str, int, float]:
    """Sampler, steps and guidance of a model's pictures: those that all share, or of a model of few steps its own.

    A flag goes before both."""
    (kind, guidance), config = shared, model.folder.config("scheduler")
    few = samplers.few_steps(config)
    if few is None:
        return kind, args.steps or samplers.STEPS, guidance
    guidance = model.folder.guidance if args.guidance is None else args.guidance
    return args.sampler or samplers.own(config), args.steps or few, guidance


def draw(setup: Setup, model: Candidate, what: str, prompts: list[str], **options) -> list[Path]:
    """Draws the missing pictures of a loaded model for "fidelity" or "protocol". Returns the paths of all."""
    args = setup.args
    sampler, steps, guidance = how(args, model, setup.drawn_with[what])
    schedule = samplers.schedule(sampler, model.folder.config("scheduler"), steps)
    settings = {"weights": model.fingerprint, "sampler": sampler, "steps": steps}
    settings |= {"quantization": str(model.folder.quantization)} if model.folder.quantization else {}
    settings |= {"guidance": guidance, "resolution": setup.resolution, "dtype": setup.dtype.name}

    def pictures_of(indices: list[int]) -> Iterator[np.ndarray]:
        return batches.draw(
            model.pipeline,
            [prompts[i] for i in indices],
            lambda k: batches.noise_of([args.seed, indices[k]], setup.latents, schedule),
            schedule,
            guidance,
            batch_size=args.batch_size,
            words=f"{what}: drawing {len(indices):,} of {len(prompts):,}, {model.name}",
        )

    return resumable.draw(
        args.out / "pictures" / what / re.sub(r"[^\w.-]+", "-", model.name).strip("-"),
        prompts,
        pictures_of,
        settings=settings | {"seed": args.seed},
        **options,
    )


class HeldOut(NamedTuple):
    """Held-out pictures and captions, and what is compared on them."""

    captions: list[str]
    images: np.ndarray  # uint8[n, H, W, 3]
    schedule: diffusion.NoiseSchedule
    pairs: list[tuple]  # of features, by model


def hold_out(setup: Setup, models: list[Candidate], settings: dict, notes: list[str]) -> HeldOut:
    """Opens the validation split, and finds the relation of each model to the teacher.

    Raises ValueError for a model that cannot be compared, or without pictures."""
    args, teacher = setup.args, models[0]
    schedule = diffusion.NoiseSchedule.from_config(teacher.folder.config("scheduler"))
    edges = fidelity.timestep_bins(len(schedule.alphas_cumprod), args.bins)
    pairs: list[tuple] = [()]
    for model in models[1:]:
        candidates.check(model, teacher)
        unets = model.folder.config("unet"), teacher.folder.config("unet")
        kind, found = fidelity.relation(*unets, args.pairing, model.rows)
        pairs.append(found)
        settings[f"{model.name} is"] = kind or "another network"
        if kind is None:
            notes.append(f"{model.name} is not a student of {teacher.name}: features are not compared.")
    source = sources.open_source(args.data, "validation", resolution=setup.resolution)
    chosen = sources.readable(source, range(min(args.examples, len(source))))
    n = len(chosen)
    if n < 1:
        raise ValueError(f"{n} held-out pictures ({args.data}, --examples {args.examples}): 1 is needed")
    notes += ["A Fréchet distance cannot be measured on 1 picture."] if n == 1 else []
    settings |= {"data": f"{n} held-out pictures of {args.data}", "pairing": args.pairing}
    settings["timesteps"] = edges.tolist()
    examples = [source[i] for i in chosen]
    images = np.stack([example["image"] for example in examples])
    return HeldOut([example["caption"] for example in examples], images, schedule, pairs)


def measure_fidelity(setup: Setup, models: list[Candidate], held: HeldOut, rows: list[dict]) -> Path:
    """Adds the measurements of fidelity.py to the rows, teacher first. Writes samples.png and returns its path."""
    args, mesh = setup.args, setup.mesh
    teacher = candidates.load(models[0], setup.dtype, mesh)
    scaling_factor = teacher.folder.scaling_factor
    pixels = candidates.encode(
        teacher, held.images, args.batch_size, mesh, "held out", encoding.encoded(teacher.folder)
    )
    moments, beside = pixels.pop("moments"), {}
    if pixels:  # every picture with one of its masks, the same for all models
        beside["beside"] = np.asarray(inputs.beside(jax.random.key(args.seed), **pixels, scaling_factor=scaling_factor))
    noise = np.random.default_rng(args.seed).standard_normal((len(moments), *setup.latents), np.float32)
    latents = np.asarray(sample_latents(noise, moments, scaling_factor))
    features = lambda moments: fidelity.latent_features(np.split(moments, 2, axis=-1)[0] * scaling_factor)
    drawn, of_teacher, reference = {}, None, candidates.network(teacher, held.captions, setup.resolution, beside)
    for found, pairs, row in zip(models, held.pairs, rows, strict=True):
        first = found is models[0]
        model = teacher if first else candidates.load(found, setup.dtype, mesh)
        paths = draw(setup, model, "fidelity", held.captions)
        drawn[model.name] = images = np.stack([resumable.read(path) for path in paths])
        own = features(candidates.encode(teacher, images, args.batch_size, mesh, model.name)["moments"])
        several = len(own) > 1  # a covariance needs them
        row |= {"frechet_latent_data": fidelity.frechet(own, features(moments))} if several else {}
        if first:
            of_teacher, of_images = own, images
            continue
        row["psnr"] = float(fidelity.psnr(images, of_images).mean())
        row["ssim"] = float(fidelity.ssim(images, of_images).mean())
        row |= {"frechet_latent": fidelity.frechet(own, of_teacher)} if several else {}
        values = fidelity.errors(
            candidates.network(model, held.captions, setup.resolution, beside),
            reference,
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
        del model  # before the next one loads: at full size it takes gigabytes of the device
    path = args.out / "samples.png"
    grids.grid({name: images[:SHOWN] for name, images in drawn.items()}, held.captions[:SHOWN], path)
    return path


def measure_protocol(setup: Setup, models: list[Candidate], prompts, scorer, likeness, rows: list[dict]) -> None:
    """Draws this process's share of the pictures. The first process then waits for the others and adds the scores."""
    args, size = setup.args, scores.SIZE
    shared = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    paths = []
    for found in models:
        model = candidates.load(found, setup.dtype, setup.mesh)
        paths.append(draw(setup, model, "protocol", prompts, size=size, suffix=scores.SUFFIX, **shared))
        del model
    hosts.wait("drawn")
    if jax.process_index() > 0:
        return
    read = lambda path: resumable.read(path, size)
    scorer = scores.real_statistics(scorer, read, args.batch_size, args.out / "real.npz")
    likeness = likeness and subject.prepared(likeness, read, args.batch_size)
    for row, drawn in zip(rows, paths, strict=True):
        row |= scores.score(scorer, drawn, prompts, read, args.batch_size, row["model"])
        if likeness is not None:
            row |= subject.score(likeness, drawn, read, args.batch_size, row["model"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser("flaxkd.evaluate", __doc__, {"--reference": "--teacher"})
    add = parser.add_argument
    rows = f"{command.MODEL}; repeat for several rows"
    command.add(parser, "model", dest="models", action=command.Several, required=True, help=rows)
    command.add(parser, "teacher")
    command.add(parser, "vae")
    command.add(parser, "clip-skip", help="last layers of the teacher's text encoder to leave out; default: 0")
    command.add(parser, "out", default=Path("evaluation"), help="result folder (default: %(default)s)")
    own = "a model of few steps has its own"
    command.add(parser, "steps", help=f"denoising steps; default: {samplers.STEPS}; {own}")
    published = f"{scores.GUIDANCE:g} and {scores.SAMPLER} for the published protocol"
    add("--guidance", type=float, help=f"default, as for --sampler: the teacher's own; {published}; {own}")
    add("--sampler", metavar="SAMPLER", help=f"{', '.join(samplers.KINDS)}")
    add("--resolution", type=int, help="pixels per side (default: the teacher's own)")
    command.add(parser, "seed")
    command.add(parser, "batch-size", default=16, help="pictures at a time, over the devices of a process")
    command.add(parser, "dtype")
    anchor = "add each student as it was before training (default: it is added)"
    add("--as-cut", action=argparse.BooleanOptionalAction, default=True, help=anchor)
    hosts.add_arguments(parser)
    group = parser.add_argument_group("fidelity to the teacher")
    group.add_argument(
        "--fidelity", action=argparse.BooleanOptionalAction, default=True, help="measure it; default: yes"
    )
    group.add_argument("--data", default="openmoji", help="'openmoji' or a folder of pictures with metadata.jsonl")
    group.add_argument("--examples", type=int, default=128, help="held-out captions (default: %(default)s)")
    group.add_argument("--bins", type=int, default=10, help="timestep ranges (default: %(default)s)")
    group.add_argument("--pairing", choices=[*students.PAIRINGS], default="segmind", help="feature pairs")
    group = parser.add_argument_group("published protocol (needs the extra eval)")
    group.add_argument("--prompts", type=Path, help=".txt (one prompt per line) or .csv (a text column)")
    group.add_argument("--limit", type=int, help="use only the first LIMIT prompts")
    group.add_argument("--real", type=Path, help="folder of real pictures, or .npz with mu and sigma; needed for FID")
    group.add_argument("--inception", type=Path, help="InceptionV3 weights of torch-fidelity (default: downloaded)")
    like = "folder of a subject's pictures: DINO and CLIP-I, and without --real no Inception is needed"
    group.add_argument("--subject", type=Path, help=like)
    group.add_argument("--dino", default=subject.DINO, help="ViT of transformers (default: %(default)s)")
    group.add_argument("--clip", default=scores.CLIP, help="CLIP of transformers (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.prompts is None:
        protocol = ["--limit", "--real", "--inception", "--subject", "--dino", "--clip"]
        command.refuse(parser, args, protocol, "of the published protocol, which needs --prompts FILE")
    elif args.subject is None:
        command.refuse(parser, args, ["--dino"], "of --subject")
    return args
