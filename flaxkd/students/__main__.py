"""Prints the table of students for every family: what each keeps, its size and cost, and the feature pairs.

python -m flaxkd.students
"""

import sys
import textwrap
from collections.abc import Sequence

import jax

from flaxkd.machine import command
from flaxkd.pretrained import ARCHITECTURES, FAMILIES
from flaxkd.students import cutting
from flaxkd.students.pairs import feature_pairs
from flaxkd.students.table import CLASH, TABLE, diagram


def size_table(title: str, teacher_config: dict) -> str:
    """The students of one teacher as text: names, kept layers, parameters and FLOPs with their shares."""
    size, channels = teacher_config["sample_size"], teacher_config["in_channels"]
    head = f"{'down blocks | mid | up blocks':33}{'parameters':>14}{'share':>8}{'GFLOPs':>10}{'share':>8}"
    lines = [f"{title}, latents {size}x{size}x{channels}", f"  {'':20}{head}"]
    whole = cutting.cost(teacher_config)
    for student in (None, *TABLE):
        name = " = ".join(student.names) if student else "teacher"
        parameters, flops = cutting.cost(cutting.config(student, teacher_config)) if student else whole
        shares = parameters / whole[0], flops / whole[1]
        numbers = f"{parameters:14,}{shares[0]:8.1%}{flops / 1e9:10,.1f}{shares[1]:8.1%}"
        lines.append(f"  {name:20}{diagram(student):33}{numbers}")
    return "\n".join(lines)


def pair_table() -> str:
    """The feature pairs of every published student as text, the same for every teacher."""
    lines = ["Feature pairs; a block is named once where student and teacher agree, else student<-teacher"]
    for student in TABLE:
        for pairing, published in student.published.items():
            pairs = feature_pairs(student, pairing)
            words = " ".join(s if s == t else f"{s}<-{t}" for s, t in pairs)
            head = f"  {published.name:10}{published.title:18}{pairing:9}{len(pairs)}  "
            wrap = {"width": 110, "initial_indent": head, "subsequent_indent": " " * len(head)}
            lines += textwrap.wrap(words, break_on_hyphens=False, break_long_words=False, **wrap)
    return "\n".join(lines)


@command.reported()
def main(arguments: Sequence[str] = ()) -> None:
    command.parser("flaxkd.students", __doc__).parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # counting needs no accelerator, and a run may be using it
    for family in FAMILIES.values():
        shown = ARCHITECTURES[family.shown]
        print(size_table(shown.title, shown.unet) + "\n", flush=True)
    print("Digits are layers kept, dots layers removed. GFLOPs: one forward pass, batch 1, 77 text tokens.")
    print(f"Names: {CLASH}.\nNames joined by = are one network, compared at different features.\n")
    print(pair_table())


if __name__ == "__main__":
    main(sys.argv[1:])
