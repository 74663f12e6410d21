"""Draws the README's picture from the table of students: what each keeps of its teacher, and what is compared.

    python -m flaxkd.blocks --out docs/blocks.png

The ending of the file decides the format: png, svg or pdf.
"""

from pathlib import Path

import jax

from flaxkd.machine import command
from flaxkd.students import picture


def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.blocks", __doc__)
    command.add(parser, "out", default=Path("docs/blocks.png"), help="png, svg or pdf")
    out = parser.parse_args(arguments).out
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    picture.draw(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
