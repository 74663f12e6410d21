"""Draws the README's picture from the table of students: what each keeps of its teacher, and what is compared.

    python -m flaxkd.blocks --out docs/blocks.png
    python -m flaxkd.blocks --teacher sdxl --out sdxl.svg

The file's extension sets the format: png, svg or pdf.
"""

from pathlib import Path

import jax

from flaxkd import students
from flaxkd.machine import command, files
from flaxkd.pretrained import ARCHITECTURES, FAMILIES
from flaxkd.students import picture


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.blocks", __doc__)
    command.add(parser, "out", default=Path("blocks.png"), help="png, svg or pdf; default: %(default)s")
    help = "the architecture whose students are drawn; default: %(default)s"
    parser.add_argument("--teacher", choices=ARCHITECTURES, default="sd15", help=help)
    args = parser.parse_args(arguments)
    out, teacher = args.out, ARCHITECTURES[args.teacher]
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    with files.whole(out) as path:
        picture.draw(path, students.of(FAMILIES[teacher.family]), teacher.unet, teacher.title, out.suffix[1:])
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
