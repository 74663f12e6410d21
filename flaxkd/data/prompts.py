"""Prompts to draw, read from a file."""

import csv
from pathlib import Path


def read(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` prompts (None: all) of a file: the lines of a .txt, or the text column of a .csv with header.

    BK-SDM's metadata.csv fits. Blank lines of a .txt are skipped. Raises FileNotFoundError, or ValueError that names
    the faulty line, or the number of prompts if there are fewer than `limit`."""
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"the first {limit} prompts of {path}: 1 is the least")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.absolute()} with prompts: give a .txt or a .csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = csv.DictReader(file)
            known = [name for name in ("text", "caption", "prompt") if name in (rows.fieldnames or ())]
            if not known:
                raise ValueError(
                    f"{path} has the columns {', '.join(rows.fieldnames or ['(none)'])}: one has to be called text, "
                    "caption or prompt"
                )
            found = []
            for row in rows:
                if not (row[known[0]] or "").strip():
                    raise ValueError(f"{path}, line {rows.line_num}: the column {known[0]} is empty")
                found.append(row[known[0]].strip())
        elif path.suffix == ".txt":
            found = [line.strip() for line in file if line.strip()]
        else:
            raise ValueError(f"{path} is neither .txt (one prompt per line) nor .csv (a text column)")
    if len(found) < (limit or 1):
        raise ValueError(f"{path} has {len(found)} prompts, {limit or 1} are needed")
    return found[:limit]
