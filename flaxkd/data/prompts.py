"""Prompts to draw, read from a file."""

from pathlib import Path

from flaxkd.data import metadata, text


def read(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` prompts (None: all) of a file: the lines of a .txt, or the text column of a .csv with header.

    BK-SDM's metadata.csv fits. Blank lines of a .txt are skipped. Raises FileNotFoundError, or ValueError that names
    the faulty line, or the number of prompts if there are fewer than `limit`."""
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"the first {limit} prompts of {path}: 1 is the least")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.absolute()} with prompts: give a .txt or a .csv")
    if path.suffix.lower() in (".csv", ".tsv"):
        rows = metadata.rows(str(path), path.read_bytes())
        names = list(rows[0].about)
        known = [name for name in ("text", "caption", "prompt") if name in names]
        if not known:
            raise ValueError(
                f"{path} has the columns {', '.join(names) or '(none)'}: one has to be called text, caption or prompt"
            )
        found = []
        for row in rows:
            if row.fault or not (row.about.get(known[0]) or "").strip():
                raise ValueError(f"{path}, {row.place}: {row.fault or f'the column {known[0]} is empty'}")
            found.append(row.about[known[0]].strip())
    elif path.suffix.lower() == ".txt":
        try:
            lines = text.decode(path.read_bytes()).splitlines()
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
    else:
        raise ValueError(f"{path} is neither .txt (one prompt per line) nor .csv (a text column)")
    if len(found) < (limit or 1):
        raise ValueError(f"{path} has {len(found)} prompts, {limit or 1} are needed")
    return found[:limit]
