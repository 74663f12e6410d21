"""Prints the table of students for every family: what each keeps, its size and cost, and the feature pairs.

    python -m flaxkd.students

With --choose, a teacher chooses what its student keeps, by the error of its output without each part (LAPTOP-Diff,
arXiv:2404.11098): see docs/choosing.md. `--config.student=FILE.json` then trains it.

    python -m flaxkd.students --choose --keep 0.5 [--teacher DIR] [--source DIR] [--out FILE.json]
"""

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax

from flaxkd.machine import command
from flaxkd.pretrained import ARCHITECTURES, FAMILIES, Folder
from flaxkd.pretrained.families import Family
from flaxkd.students import cutting
from flaxkd.students.pairs import feature_pairs
from flaxkd.students.row import CHOSEN, Student
from flaxkd.students.table import CLASH, TABLE, diagram, of


def size_table(family: Family) -> str:
    """The students of a family as text: names, kept layers, parameters and FLOPs with their shares."""
    teacher = ARCHITECTURES[family.shown]
    size, channels = teacher.unet["sample_size"], teacher.unet["in_channels"]
    head = f"{'down blocks | mid | up blocks':33}{'parameters':>14}{'share':>8}{'GFLOPs':>10}{'share':>8}"
    lines = [f"{teacher.title}, latents {size}x{size}x{channels}", f"  {'':20}{head}"]
    whole = cutting.cost(teacher.unet)
    for student in (None, *of(family)):
        name = " = ".join(student.names) if student else "teacher"
        parameters, flops = cutting.cost(cutting.config(student, teacher.unet)) if student else whole
        shares = parameters / whole[0], flops / whole[1]
        numbers = f"{parameters:14,}{shares[0]:8.1%}{flops / 1e9:10,.1f}{shares[1]:8.1%}"
        lines.append(f"  {name:20}{diagram(student, family):33}{numbers}")
    return "\n".join(lines)


def basis_table() -> str:
    """What of each row is published, estimated or chosen, and its transformer blocks where not all are kept."""
    rows = [(student.names[0], [student.basis, *transformer_blocks(student)]) for student in TABLE]
    lines = [line for name, words in rows for line in wrapped(f"  {name:14}", "; ".join(words), " " * 16)]
    return "\n".join(["What of the rows is published; and the transformer blocks of attentions that keep few", *lines])


def transformer_blocks(student: Student) -> list[str]:
    """["0 1 2 6 in down 2 (0 1), up 0 (0 1)", ...]: transformer blocks, and the attentions that keep these alone."""
    where: dict[tuple[int, ...], list[str]] = {}
    for block, layers in student.blocks.values():
        for kept in dict.fromkeys(filter(None, layers.values())):
            attentions = " ".join(str(i) for i in layers if layers[i] == kept)
            place = block.replace("_blocks.", " ").replace("_block", "")
            where.setdefault(kept, []).append(f"{place} ({attentions})")
    return [f"{' '.join(map(str, kept))} in {', '.join(places)}" for kept, places in where.items()]


def pair_table() -> str:
    """The feature pairs of every published student as text, the same for every teacher."""
    lines = ["Feature pairs; a module is named once where student and teacher agree, else student<-teacher"]
    for student in TABLE:
        for pairing, published in student.published.items():
            pairs = feature_pairs(student, pairing)
            lines.append(f"  {published.name:14}{published.title:20}{pairing:13}{len(pairs):2}")
            words = [s if s == t else f"{s}<-{t}" for s, t in folded(pairs)]
            words = [each if len(each) < 110 else each.replace("<-", " <- ") for each in words]
            lines += wrapped(" " * 6, " ".join(words), " " * 6)
    return "\n".join(lines)


def folded(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs, those of an attention's transformer blocks as one: "transformer_blocks.0,1,2.attn1"."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for pair in pairs:
        numbers = [re.search(r"(?<=transformer_blocks\.)\d+|$", module).group() for module in pair]
        names = tuple(re.sub(r"(?<=transformer_blocks\.)\d+", "{}", module) for module in pair)
        found.setdefault(names, []).append(tuple(numbers))
    return [tuple(name.format(",".join(n)) for name, n in zip(names, zip(*numbers, strict=True), strict=True))
            for names, numbers in found.items()]  # fmt: skip


def wrapped(head: str, words: str, indent: str) -> list[str]:
    """Lines of words, the first after `head` and the others after `indent`. A word is never broken."""
    wrap = {"width": 110, "initial_indent": head, "subsequent_indent": indent}
    return textwrap.wrap(words, break_on_hyphens=False, break_long_words=False, **wrap)


def choose(args: argparse.Namespace) -> None:
    """Writes the student that a teacher chooses, and prints why."""
    from flaxkd import choosing  # a table needs none of it
    from flaxkd.data import encoding, sources
    from flaxkd.machine import sharding

    folder = Folder.open(args.teacher, args.vae)
    given = {"teacher": args.teacher, "vae": args.vae, "data.source": args.source, "seed": args.seed}
    given |= {"data.resolution": args.resolution or folder.resolution}
    typed = [f"--config.{key}={value}" for key, value in given.items() if value is not None]
    config = command.configuration("default", ["--config.student=None", *typed])
    encoding.check_sizes(folder, config.data.resolution, encoding.sizes(config), "--")
    pictures = sources.open_source(config.data.source, "train", resolution=config.data.resolution)
    options = dict(of_flops=args.flops, examples=args.examples, beside=args.students)
    choice = choosing.choose(config, folder, pictures, sharding.compute_dtype(args.dtype), args.keep, **options)
    choice.write(args.out)
    picture, table = (args.out.with_suffix(ending) for ending in (".png", ".txt"))
    typed += [f"--config.student={args.out}", f"--config.pairing={next(iter(choice.student.published))}"]
    typed = shlex.join(["python", "-m", "flaxkd.train", "--config", "configs/keep.py", "--config.keep=None", *typed])
    print(f"{choice}\n\nwrote {args.out}, {picture} and {table}")
    print(f"\nnext: look at {picture}, then train this student, e.g.\n  {typed}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command.parser("flaxkd.students", __doc__)
    add = parser.add_argument
    add("--choose", action="store_true", help="let a teacher choose its student; the other flags are for this alone")
    add("--keep", type=float, help="share of the teacher's parameters that the student keeps, at most: 0.5")
    add("--flops", action="store_true", help="--keep is a share of its FLOPs in a forward pass instead")
    command.add(parser, "teacher", "vae")
    add("--source", help="of pictures, as config.data.source; default: openmoji")
    add("--resolution", type=int, help="of the pictures in pixels; default: the teacher's own")
    add("--examples", type=int, default=256, help="pictures with a noise each, at least; default: %(default)s")
    command.add(parser, "students", default=(), help="also measure this student as cut; repeat for several")
    command.add(parser, "seed", "dtype")
    command.add(parser, "out", default=Path(CHOSEN[0]), help="the row; default: %(default)s")
    args = parser.parse_args(arguments)
    if not args.choose:
        return args if args.keep is None else parser.error("--keep is for --choose")
    if args.keep is None or not 0 < args.keep < 1:
        parser.error("--choose needs --keep, a share between 0 and 1, as 0.5")
    if args.examples < 1:
        parser.error("--examples must be at least 1")
    if args.out.suffix != ".json":
        parser.error(f"--out {args.out} must end in .json")
    return args


@command.reported()
def main(arguments: Sequence[str] = ()) -> None:
    args = parse(arguments)
    if args.choose:
        command.keep_compiled_programs()
        choose(args)
        return
    jax.config.update("jax_platforms", "cpu")  # counting needs no accelerator, and a run may be using it
    for family in FAMILIES.values():
        print(size_table(family) + "\n", flush=True)
    print("Digits are layers kept, dots layers removed; res is the first resnet of a mid block.")
    print("GFLOPs: one forward pass, batch 1, 77 text tokens.")
    print(f"Names: {CLASH}.\nNames joined by = are one network, compared at different features.\n")
    print(basis_table() + "\n\n" + pair_table())


if __name__ == "__main__":
    main(sys.argv[1:])
