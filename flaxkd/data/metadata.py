"""Files that list pictures with captions: metadata.jsonl, .csv, .tsv or .parquet, as in Hugging Face's imagefolder.

Every row is returned, and none is guessed: a row that cannot be read says why.
"""

import csv
import io
import posixpath
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from flaxkd.data import text
from flaxkd.data.pictures import is_picture

NAMES = tuple(f"metadata.{ending}" for ending in ("jsonl", "csv", "tsv", "parquet"))
FILES = ("file_name", "filename", "file", "file_path", "path", "image_path", "image_file")  # usual names of the column
CAPTIONS = ("txt", "text", "caption", "prompt", "captions/text")  # usual names; the first one present counts
DELIMITERS = ",;\t|"

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


class Row(NamedTuple):
    """A row of a list of pictures: its place in the file, its columns, and why it cannot be used ("" if it can)."""

    place: str
    about: dict[str, Any]
    fault: str = ""


def is_metadata(name: str) -> bool:
    return posixpath.basename(name).lower() in NAMES


def order(name: str) -> tuple[int, str]:
    """Of metadata files: the one to read of several in a folder comes first."""
    return NAMES.index(posixpath.basename(name).lower()), name


def rows(name: str, content: bytes) -> list[Row]:
    """The rows of a metadata file. Raises ValueError, with its name, if it is damaged or has no rows."""
    ending = name.rpartition(".")[2].lower()
    try:
        if ending == "parquet":
            table = pq.read_table(io.BytesIO(content))
            table.validate(full=True)
            found = [Row(f"row {i}", about) for i, about in enumerate(table.to_pylist())]
        else:
            lines = text.decode(content)
            found = list(_csv(lines) if ending in ("csv", "tsv") else _jsonl(lines))
    except (ValueError, OSError, MemoryError, pa.ArrowException) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{name} is empty")
    return found


def _jsonl(lines: str) -> Iterator[Row]:
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            about = text.parse(line)
        except ValueError as error:
            yield Row(place, {}, f"not JSON ({error})")
            continue
        fault = (
            "" if isinstance(about, dict) else f"a {type(about).__name__}, must be an object with file_name and text"
        )
        yield Row(place, {} if fault else about, fault)


def _csv(content: str) -> Iterator[Row]:
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    lines = [(n, line) for n, line in enumerate(io.StringIO(content), start=1) if line.strip()]
    if not lines:
        return
    (_, header), *lines = lines
    known = {*FILES, *CAPTIONS}
    parsed = {sign: _fields(header, sign) or [] for sign in DELIMITERS}
    score = lambda sign: (sum(name.strip().lower() in known for name in parsed[sign]), len(parsed[sign]))
    delimiter = max(DELIMITERS, key=score)
    names = [name.strip() for name in parsed[delimiter]]
    if any(is_picture(name) for name in names):
        raise ValueError(f"its first line is {header.strip()!r}, must name the columns, such as file_name,text")
    found = list(_logical(lines, delimiter, names))
    regular = [fields for _, fields in found if fields and len(fields) == len(names)]
    checks = [_check(name, [fields[i] for fields in regular]) for i, name in enumerate(names)]
    for number, fields in found:
        place, extra = f"line {number}", len(fields or ()) - len(names)
        if fields and extra > 0 and any(fields[len(names) :]):
            fields = _mended(fields, extra, delimiter, checks)
            if not fields:
                yield Row(place, {}, f"it has {len(names) + extra} columns, not {len(names)}: put its text into quotes")
                continue
        yield Row(place, dict(zip(names, fields or (), strict=False)), "" if fields else "it has unbalanced quotes")


def _fields(line: str, delimiter: str, quoting: int = csv.QUOTE_MINIMAL) -> list[str] | None:
    """The fields of a row, which may have several lines; None if its quotes are unbalanced."""
    try:
        (fields,) = csv.reader(io.StringIO(line, newline=""), delimiter=delimiter, quoting=quoting, strict=False)
    except (csv.Error, ValueError):
        return None
    return fields


def _logical(lines: list, delimiter: str, names: list[str]) -> Iterator[tuple[int, list[str] | None]]:
    """(line number, fields) of every row. A quoted text may go on over several lines.

    A line that is a whole row with a picture's name begins a new row, even if the one before left a quote open."""
    whole = lambda fields: fields and len(fields) >= len(names) and any(map(is_picture, fields))
    at = 0
    while at < len(lines):
        number, row = lines[at]
        end = at + 1
        while row.count('"') % 2 and end < len(lines):
            line = lines[end][1]
            if line.count('"') % 2 == 0 and whole(_fields(line, delimiter)):
                break
            row, end = row + line, end + 1
        if row.count('"') % 2:  # never closed: the quote is part of the text, and the lines are rows of their own
            row, end = lines[at][1], at + 1
            yield number, _fields(row, delimiter, csv.QUOTE_NONE)
        else:
            yield number, _fields(row, delimiter)
        at = end


def _check(name: str, column: list[str]):
    """What a value of a column has to be, as far as its name and its other values tell: a picture, a number, or any."""
    if not column:
        return is_picture if name.lower() in FILES else None
    return next((check for check in (is_picture, _is_number) if all(map(check, column))), None)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _mended(fields: list[str], extra: int, delimiter: str, checks: list) -> list[str] | None:
    """A row with too many fields, where one text has unquoted delimiters. None if it may be more than one text."""
    if sum(map(is_picture, fields)) > 1:  # two rows run together
        return None
    found = []
    for i, check in enumerate(checks):
        if check is None:
            joined = [*fields[:i], delimiter.join(fields[i : i + extra + 1]), *fields[i + extra + 1 :]]
            if all(check is None or check(value) for check, value in zip(checks, joined, strict=True)):
                found.append(joined)
    return found[0] if len(found) == 1 else None
