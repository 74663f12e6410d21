"""Turns a large image set into a cache of latents, token ids and sizes. Training reads it in place of pictures.

    python -m flaxkd.cache --source laion/ --teacher OWNER/NAME --out cache/ [--min-aesthetic 6.5] [--flip]
    python -m flaxkd.train --config configs/small.py:sd15 --config.data.source=cache/
    python -m flaxkd.cache --bench cache/
    python -m flaxkd.cache --draw 1000 [--prompts FILE] [--teacher OWNER/NAME] [--lora FILE] --out DIR

The source is a folder of img2dataset's tars, Parquet or a Hugging Face data set with the pictures inside, a folder or
zip of pictures, or the name of a TFDS data set. What is unreadable or has no caption is left out and listed. The same
command resumes where it stopped, on any number of hosts: see docs/laion_art.md.

--draw makes a synthetic set: the teacher draws N pictures, of the prompts of a file or of the captions of a source, and
its folder is the data.source of a training.
"""

import argparse
import contextlib
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from etils import epath

from flaxkd import export
from flaxkd.data import buckets, encoding, large, loader, openmoji, pictures, prompts, readers, sources
from flaxkd.data.filters import Recipe
from flaxkd.diffusion import samplers
from flaxkd.drawing import data_set, resumable
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import command, configuration, files, hosts, owners, sharding, streams
from flaxkd.pretrained import Folder, lora_files

CONSUMED = 270  # images/s read from a cache by a v5e-8 in Segmind's recipe, an estimate


def run(args: argparse.Namespace) -> dict | None:
    """Makes this process's share of the cache. Returns {"train", "validation": pictures; "filtered", "skipped":
    {reason: pictures}} once all shares are done, else None.

    Raises as `readers.open_chunks`, `Folder.open` and `large.build` do."""
    pictures.color(args.background)
    if not 0 < args.validation < 1:
        raise ValueError(
            f"--validation is {args.validation:g}, must be a share of the captions between 0 and 1, as 0.05"
        )
    chunks = readers.open_chunks(args.source, split=args.split, image_column=args.image_column)
    folder = Folder.open(args.teacher, args.vae)
    mesh, dtype = sharding.local_mesh(), sharding.compute_dtype(args.dtype)
    resolution = args.resolution or folder.resolution
    sizes = buckets.sizes(args.buckets, resolution)
    encoding.check_sizes(folder, resolution, sizes, "--")
    args.batch_size = args.batch_size or encoding.at_a_time(sizes)
    recipe = Recipe(
        resolution=resolution,
        buckets=args.buckets and sizes,
        flip=args.flip,
        validation=args.validation,
        min_aesthetic=args.min_aesthetic,
        min_size=args.min_size,
        background=args.background,
        caption_column=args.caption_column,
        aesthetic_column=args.aesthetic_column,
    )
    if jax.process_index() == 0:
        print(
            f"source    {args.source}, {len(chunks):,} chunks\nteacher   {folder.path}\n"
            f"machine   {jax.process_count()} x {mesh.size} x {mesh.devices.flat[0].device_kind}, "
            f"{np.dtype(dtype).name}\n"
            f"pictures  {', '.join(f'{height} x {width}' for height, width in sizes)} pixels, "
            f"{args.batch_size * mesh.size} at a time in each process",
            flush=True,
        )
    with held(args.out):
        made = build(args, chunks, recipe, folder, dtype, mesh)
    if made is None:
        print(
            f"\nprocess {jax.process_index()} of {jax.process_count()} is done, others are not. If one has stopped, "
            "run the same command again"
        )
    else:
        conclude(made, args, recipe)
    return made


@contextlib.contextmanager
def held(out: str) -> Iterator[None]:
    """In this context, `out` is this run's alone. The first process holds it, until all are done. Buckets have no
    locks. Raises owners.Held if another run works there."""
    with contextlib.ExitStack() as lock:
        if jax.process_index() == 0 and "://" not in out:
            folder = Path(out)
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(owners.alone(folder, "flaxkd.cache"))
            files.clear(folder)
        yield
        hosts.wait("the cache is done")


def build(args: argparse.Namespace, chunks: list, recipe: Recipe, folder: Folder, dtype, mesh) -> dict | None:
    """This process's share of the cache, as `run` says."""
    return large.build(
        chunks,
        args.out,
        recipe,
        encode=encoding.encoder(folder, dtype, mesh),
        encoded=encoding.encoded(folder),
        tokenize=folder.tokenize,
        batch_size=args.batch_size * mesh.size,
        fingerprint=encoding.encoder_fingerprint(folder, dtype),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=args.threads,
    )


def conclude(made: dict, args: argparse.Namespace, recipe: Recipe) -> None:
    print(f"\n{args.out}: {made['train']:,} pictures to train on, {made['validation']:,} to validate")
    for kind, note in (("filtered", ""), ("skipped", ", listed in skipped.jsonl")):
        for reason, count in sorted(made[kind].items(), key=lambda entry: -entry[1]):
            print(f"  {kind} {count:,}: {reason}{note}")
    flags = ["configs/small.py:sd15", f"--config.teacher={args.teacher}"] if args.teacher else ["configs/small.py"]
    flags += [f"--config.vae={args.vae}"] if args.vae else []
    flags += [f"--config.data.source={args.out}", f"--config.data.resolution={recipe.resolution}"]
    flags += [f"--config.data.random_flip={recipe.flip}"]
    flags += [f"--config.data.buckets={args.buckets}"] if args.buckets else []
    typed = shlex.join(["python", "-m", "flaxkd.train", "--config", *flags])
    print(f"\nnext: train with this teacher, e.g.\n  {typed}")


def draw(args: argparse.Namespace) -> list[Path]:
    """A folder of pictures that the teacher draws, with captions. Returns their paths.

    Raises as `prompts.read`, `sources.open_source`, `lora_files.applied` and `data_set.draw` do."""
    if args.draw < 1:
        raise ValueError(f"--draw is {args.draw}, must be at least 1")
    folder = lora_files.applied(export.open_model(args.teacher, args.vae), args.lora)
    resolution = args.resolution or folder.resolution
    folder.check_resolution(resolution, "--resolution")
    if args.prompts is not None:
        found = prompts.read(args.prompts)
    else:
        columns = {"caption_column": args.caption_column, "image_column": args.image_column}
        source = sources.open_source(args.source or "openmoji", args.split, resolution=resolution, **columns)
        captions = source.all_captions()
        order = np.random.default_rng(args.seed).permutation(len(captions))
        found = [captions[i] for i in order]
    wanted = [found[i % len(found)] for i in range(args.draw)]
    dtype, out = sharding.compute_dtype(args.dtype), Path(args.out)
    data_set.check(out, "choose another --out")
    pipeline = Pipeline.from_folder(folder, str(folder.path), dtype)
    how = data_set.How(resolution, args.seed, args.sampler, args.steps, args.guidance)
    remedy = "Remove that folder, or choose another --out."
    about = {"prompts_sha256": resumable.digest(wanted)}
    made = data_set.draw(out, wanted, pipeline, how, about, remedy=remedy, words="pictures")
    typed = shlex.join(["--config.data.source=" + args.out, f"--config.data.resolution={resolution}"])
    print(f"\n{out}: {len(made):,} pictures of {len({*wanted}):,} prompts\n\nnext: train on them, {typed}")
    return made


def bench(folder: str, batch_size: int, seconds: float) -> float:
    """Reads batches of a cache's train split as training does. Prints and returns the rate in images/s."""
    batches = loader.Records(epath.Path(folder) / "train").batches(batch_size, seed=0)
    next(batches)  # opens files and starts threads
    wall, cpu, count = time.monotonic(), time.process_time(), 0
    while time.monotonic() - wall < seconds:
        count += len(next(batches)["moments"])
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    rate = count / wall
    print(
        f"{folder}: {rate:,.0f} images/s in batches of {batch_size} for {wall:.1f} s, {rate / CONSUMED:.1f} times the "
        f"{CONSUMED} that a v5e-8 takes; {1e6 * cpu / count:.0f} us of a core per image, {cpu / wall:.2f} cores in use"
    )
    return rate


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser("flaxkd.cache", __doc__)
    add = parser.add_argument
    add("--source", help="folder, file, pattern such as 'gs://bucket/*.tar', or name of a TFDS data set")
    command.add(parser, "teacher", help="gives the autoencoder and tokenizer; default: the embedded teacher")
    command.add(parser, "vae")
    command.add(parser, "out", type=str, help="folder of the cache, may be gs://")
    add("--resolution", type=int, help="pixels (default: the teacher's own)")
    sizes = f"sizes '((height, width), ...)' in pixels, or {' or '.join(buckets.PRESETS)}, in place of squares"
    add("--buckets", type=configuration.literal, help=sizes)
    add("--background", default=Recipe.background, help="color behind transparent pixels (default: %(default)s)")
    add("--flip", action="store_true", help="add mirrored pictures, for data.random_flip: twice the size")
    share = {"type": float, "default": openmoji.VALIDATION_SHARE}
    add("--validation", **share, help="held-out share of the captions (default: %(default)s)")
    add("--split", default="train", help="of the source, if it has several (default: %(default)s)")
    most = f"pictures on a device at a time; default: {encoding.BATCH}, and fewer of more than 512 x 512 pixels"
    command.add(parser, "batch-size", default=None, help=most)
    command.add(parser, "dtype")
    add("--threads", type=int, help="threads that decode pictures (default: one per core)")
    hosts.add_arguments(parser)
    group = parser.add_argument_group("what is kept")
    group.add_argument("--min-aesthetic", type=float, help="lowest aesthetic score")
    group.add_argument("--min-size", type=int, help="smallest shorter side in pixels, before the source was resized")
    group.add_argument("--caption-column", help="default: the .txt, text, caption or prompt")
    group.add_argument("--aesthetic-column", help="default: aesthetic or aesthetic_score")
    group.add_argument("--image-column", help="default: image, jpg, file_name, ...; of tars an ending such as left.jpg")
    group = parser.add_argument_group("a set that the teacher draws")
    group.add_argument("--draw", type=int, metavar="N", help="draw N pictures in place of reading a source")
    group.add_argument("--prompts", type=Path, help=".txt, a prompt a line, or .csv; default: captions of --source")
    command.add(group, "lora", help="LoRA file that the teacher wears; repeat for several")
    group.add_argument("--sampler", metavar="SAMPLER", help=f"{', '.join(samplers.KINDS)}; default: the model's own")
    command.add(group, "steps", help="of the sampler; default: those usual for it")
    command.add(group, "guidance")
    command.add(group, "seed")
    group = parser.add_argument_group("reading speed")
    group.add_argument("--bench", metavar="DIR", help="only read a finished cache, in batches of 256, and time it")
    group.add_argument("--seconds", type=float, default=20, help="to measure (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not args.bench and not (args.out and (args.source or args.draw is not None)):
        parser.error("give --source and --out, --draw N and --out, or --bench DIR")
    if args.bench:
        return args
    if args.draw is None:
        drawing = ["--prompts", "--lora", "--sampler", "--steps", "--guidance", "--seed"]
        command.refuse(parser, args, drawing, "of --draw")
    else:
        reading = ["--buckets", "--flip", "--validation", "--batch-size", "--threads"]
        reading += ["--min-aesthetic", "--min-size", "--aesthetic-column"]
        command.refuse(parser, args, reading, "not of --draw, which encodes nothing")
        if args.prompts is not None:
            command.refuse(parser, args, ["--source", "--caption-column", "--image-column"], "not beside --prompts")
    return args


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    command.keep_compiled_programs()
    with hosts.together(args), command.reported(command.RESUMES), streams.lasting():
        try:
            if args.bench:
                bench(args.bench, 256, args.seconds)
            elif args.draw is not None:
                draw(args)
            else:
                run(args)
        except ImportError as error:
            if "gcsfs" not in str(error):
                raise
            raise ImportError("gs:// paths need gcsfs: pip install -e '.[data]'") from error


if __name__ == "__main__":
    main()
