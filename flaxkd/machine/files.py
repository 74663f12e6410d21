"""Whole-or-absent files, folders that belong to one run, and the folder for what flaxkd can make again."""

import codecs
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
    """No space is left for a file. The unfinished file has been removed."""


def cache_home() -> Path:
    """The folder for what flaxkd can make again: $FLAXKD_CACHE, else ~/.cache/flaxkd."""
    return Path(os.environ.get("FLAXKD_CACHE") or "~/.cache/flaxkd").expanduser()


@contextlib.contextmanager
def whole(file: os.PathLike) -> Iterator[Path]:
    """A path on this machine to write to. After the block it becomes `file`; if the block fails, `file` is unchanged.

    Several processes may write the same file at once: the last one wins. file: may be `gs://`; the content is copied
    there. Missing folders are made. Raises DiskFull in place of any error that means a full disk."""
    file = epath.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
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
            # ArrayRecord raises a RuntimeError with the system's words.
            if not any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
                raise
            where = f"{file.parent} or {folder}" if remote else file.parent
            raise DiskFull(
                f"no space is left in {where} to write {file.name}. Finished files are kept, the unfinished one is "
                "removed: make room, and run the same command again to resume"
            ) from error
        finally:
            if work.exists():
                work.unlink()


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill. After the block it replaces `out`; if the block fails, `out` is unchanged."""
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
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises FileNotFoundError or ValueError, with the file's name."""
    file = epath.Path(file)
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {file}") from None
    except RecursionError:
        raise ValueError(f"{file} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        check_lfs_pointer(file)
        raise ValueError(f"{file} is not JSON ({error}): was it copied whole?") from error


def copy_plain(source: Path, out: Path) -> None:
    """Copies the files of a folder, texts without a byte order mark, JSON as UTF-8. Raises ValueError for bad JSON."""
    out.mkdir(parents=True)
    for file in sorted(path for path in Path(source).iterdir() if path.is_file()):
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
        if file.suffix == ".json":
            read = read_json(file)
            if json.detect_encoding(content) != "utf-8":
                content = json.dumps(read, ensure_ascii=False, indent=2).encode()
        (out / file.name).write_bytes(content)


def is_lfs_pointer(file: os.PathLike) -> bool:
    """Whether a file is the small text that git keeps in place of a large file."""
    with epath.Path(file).open("rb") as content:
        return content.read(40).startswith(b"version https://git-lfs.github.com/spec")


def check_lfs_pointer(file: os.PathLike) -> None:
    """Raises ValueError with the remedy for a pointer of git-LFS."""
    if is_lfs_pointer(file):
        raise ValueError(f"{file} is a pointer of git-LFS, without the content: run `git lfs pull` in its repository")


def read_jsonl(file: Path) -> list[dict]:
    """The records of a file, one JSON object a line; [] without a file. Reading ends at a line cut short by a kill."""
    records: list[dict] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def claim(file: os.PathLike, settings: dict, *, differ: str, remedy: str, free: Sequence[str] = ()) -> None:
    """Claims the folder of `file` for these settings: writes them to `file`, or compares them with those there.

    settings: what JSON can hold. free: keys that may differ; the file then gets the new values.
    Raises ValueError that names every other differing key: "FOLDER {differ}", the keys, and `remedy`."""
    file = epath.Path(file)
    if compare(file, settings, differ=differ, remedy=remedy, free=free):
        write_json(file, settings)


def compare(file: os.PathLike, settings: dict, *, differ: str, remedy: str, free: Sequence[str] = ()) -> bool:
    """Whether `file` is absent or differs in `free` keys. Raises ValueError for other keys, as `claim` does."""
    file = epath.Path(file)
    if not file.is_file():
        return True
    before, settings = read_json(file), json.loads(json.dumps(settings))  # JSON has no tuples
    before = {key: value for key, value in settings.items() if not value} | before  # a key from a later version, unset
    keys = [key for key in sorted({*before, *settings} - {*free}) if before.get(key) != settings.get(key)]
    if keys:
        lines = "".join(f"\n  {key}: {before.get(key)!r} there, {settings.get(key)!r} here" for key in keys)
        raise ValueError(f"{file.parent} {differ}:{lines}\n{remedy}")
    return before != settings
