"""Files that are whole or absent, folders that belong to one run, and where flaxkd keeps what it can make again."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath


class DiskFull(OSError):
    """No space is left where a file is written. The unfinished file has been removed."""


def cache_home() -> Path:
    """Where flaxkd keeps what it can make again: $FLAXKD_CACHE, else ~/.cache/flaxkd."""
    return Path(os.environ.get("FLAXKD_CACHE") or "~/.cache/flaxkd").expanduser()


@contextlib.contextmanager
def whole(file: os.PathLike) -> Iterator[Path]:
    """A path on this machine to write to. After the block, its content is `file`; if the block fails, nothing is.

    Several processes may write the same file at once: the last one stays. file: may be `gs://`, to which the content
    is copied. Raises DiskFull in place of any error that only says so."""
    file = epath.Path(file)
    work = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    with contextlib.ExitStack() as stack:
        remote = "://" in os.fspath(file)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="flaxkd-")) if remote else None
        local = Path(folder, file.name) if remote else Path(work)
        try:
            yield local
            if remote:
                with local.open("rb") as here, work.open("wb") as there:
                    shutil.copyfileobj(here, there, 2**20)
            work.replace(file)
        except (OSError, RuntimeError) as error:
            # ArrayRecord raises a RuntimeError that quotes the system's words.
            if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
                raise
            where = f"{file.parent} or {folder}" if remote else file.parent
            raise DiskFull(
                f"no space is left in {where} to write {file.name}. What is finished is kept, the unfinished file is "
                "removed: make room, and run the same command again, which goes on from there"
            ) from error
        finally:
            if work.exists():
                work.unlink()


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill. After the block it is `out`, in place of what was there; if the block fails, nothing is."""
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(Path(scratch) / "old")
        new.rename(out)


def write_text(file: os.PathLike, text: str) -> None:
    with whole(file) as path:
        path.write_text(text, encoding="utf-8")


def write_json(file: os.PathLike, content: Any) -> None:
    write_text(file, json.dumps(content, indent=2) + "\n")


def read_json(file: os.PathLike) -> Any:
    """The content of a JSON file. Raises FileNotFoundError or ValueError, which name the file."""
    file = epath.Path(file)
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {file}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): was it copied whole?") from error


def read_jsonl(file: Path) -> list[dict]:
    """The records of a file with a JSON object a line; [] if there is no file. A line cut short by a kill ends it."""
    records: list[dict] = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def claim(file: os.PathLike, settings: dict, *, differ: str, remedy: str, free: Sequence[str] = ()) -> None:
    """Makes the folder of `file` belong to these settings: writes them to `file`, or compares with those there.

    settings: what JSON can hold. free: keys that may differ; the file then gets the new ones.
    Raises ValueError that names every other key that differs: "FOLDER {differ}", the keys, and `remedy`."""
    file = epath.Path(file)
    if compare(file, settings, differ=differ, remedy=remedy, free=free):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)


def compare(file: os.PathLike, settings: dict, *, differ: str, remedy: str, free: Sequence[str] = ()) -> bool:
    """Whether `file` is absent, or has other values of `free` keys. Raises ValueError for others, as `claim` does."""
    file = epath.Path(file)
    if not file.is_file():
        return True
    before, settings = read_json(file), json.loads(json.dumps(settings))  # JSON has no tuples
    keys = [key for key in sorted({*before, *settings} - {*free}) if before.get(key) != settings.get(key)]
    if keys:
        lines = "".join(f"\n  {key}: {before.get(key)!r} there, {settings.get(key)!r} here" for key in keys)
        raise ValueError(f"{file.parent} {differ}:{lines}\n{remedy}")
    return before != settings
