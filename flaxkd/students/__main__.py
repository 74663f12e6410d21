"""Prints the table of students for every family: what each keeps, its size and cost, and the feature pairs.

python -m flaxkd.students
"""

import re
import sys
import textwrap
from collections.abc import Iterable, Sequence

import jax

from flaxkd.machine import command
from flaxkd.pretrained import ARCHITECTURES, FAMILIES
from flaxkd.pretrained.families import Family
from flaxkd.students import cutting
from flaxkd.students.pairs import feature_pairs
from flaxkd.students.row import Student
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


@command.reported()
def main(arguments: Sequence[str] = ()) -> None:
    command.parser("flaxkd.students", __doc__).parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # counting needs no accelerator, and a run may be using it
    for family in FAMILIES.values():
        print(size_table(family) + "\n", flush=True)
    print("Digits are layers kept, dots layers removed; res is the first resnet of a mid block.")
    print("GFLOPs: one forward pass, batch 1, 77 text tokens.")
    print(f"Names: {CLASH}.\nNames joined by = are one network, compared at different features.\n")
    print(basis_table() + "\n\n" + pair_table())


if __name__ == "__main__":
    main(sys.argv[1:])
