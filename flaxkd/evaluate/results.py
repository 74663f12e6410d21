"""What a measuring command leaves in its --out: a table, the numbers behind it, and a picture."""

from collections.abc import Callable
from pathlib import Path

from flaxkd.machine import files

Draw = Callable[[Path], object]


def write(out: Path, name: str, table: str, numbers: dict | list, draw: Draw | None = None) -> list[Path]:
    """Writes `out`/NAME.md and .json, has `draw` write .png, if given, and returns their paths."""
    md, json, png = (Path(out) / f"{name}.{ending}" for ending in ("md", "json", "png"))
    files.write_text(md, table)
    files.write_json(json, numbers)
    if draw:
        draw(png)
    return [md, json, *[png] * bool(draw)]


def report(out: Path, name: str, table: str, numbers: dict | list, draw: Draw | None = None) -> None:
    """The same; prints the table, and what was written."""
    print(table + said(write(out, name, table, numbers, draw)))


def said(written: list[Path]) -> str:
    return "\n".join(f"wrote {path}" for path in written)
