"""What a measuring command leaves in its --out: a table, the numbers behind it, and a picture."""

from collections.abc import Callable
from pathlib import Path

from flaxkd.machine import files


def write(out: Path, name: str, table: str, numbers: dict, draw: Callable[[Path], object] | None = None) -> None:
    """Writes `out`/NAME.md and .json, and has `draw` write .png, if given; prints the table and what was written."""
    out.mkdir(parents=True, exist_ok=True)
    md, json, png = (out / f"{name}.{ending}" for ending in ("md", "json", "png"))
    files.write_text(md, table)
    files.write_json(json, numbers)
    if draw:
        draw(png)
    print(table + "\n".join(f"wrote {path}" for path in (md, json, *[png] * bool(draw))))
