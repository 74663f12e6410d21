"""Whole-or-absent files, folders that belong to one run, and the folder for what flaxkd can make again."""

import codecs
import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from flaxkd.machine import owners


class DiskFull(OSError):
    """No space is left for a file. The unfinished file has been removed."""


# The system's words for a disk on which nothing can be written: libraries report them in errors of their own.
FULL = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
_opened: dict[Path, int] = {}  # by `plain`
PLAIN = re.compile(r"[A-Za-z0-9_ ./+=,@%~#(){}-]{1,1000}")


def cache_home() -> Path:
    """The folder for what flaxkd can make again: $FLAXKD_CACHE, else ~/.cache/flaxkd.

    Raises OSError if there is none and it cannot be made."""
    try:
        folder = Path(os.environ.get("FLAXKD_CACHE") or "~/.cache/flaxkd").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the second if there is no home
        raise OSError(f"{error}: let the environment variable FLAXKD_CACHE name a folder that can be written") from None
    return folder


def is_full(error: BaseException) -> bool:
    """Whether an error means that no space is left, or no more of somebody's quota. ArrayRecord, safetensors and
    TensorStore raise errors of their own, with the system's words."""
    return any(words in str(error) for words in FULL)


def size(count: float) -> str:
    """Bytes in words: 1.5 GiB, 3 MiB."""
    unit, name = next(((2**n, name) for n, name in ((30, "GiB"), (20, "MiB")) if count >= 2**n), (2**10, "KiB"))
    return f"{count / unit:,.1f} {name}"


def free(folder: os.PathLike) -> str:
    """The space left for `folder`, in words."""
    return size(shutil.disk_usage(folder).free)


def plain(folder: os.PathLike) -> Path:
    """An existing folder under a name that every library reads: its own, or for odd letters another one of the same.

    Orbax takes [x] for a pattern and TensorStore a backslash for a slash; C++ has no names that are not UTF-8. The
    other name holds within this process, as long as it runs."""
    folder = Path(folder).absolute()
    if "://" in str(folder) or PLAIN.fullmatch(str(folder)) or not os.path.isdir("/proc/self/fd"):
        return folder
    if folder not in _opened or not os.path.samestat(os.fstat(_opened[folder]), os.stat(folder)):
        _opened[folder] = os.open(folder, os.O_RDONLY)  # and left open
    return Path(f"/proc/self/fd/{_opened[folder]}")


@contextlib.contextmanager
def whole(file: os.PathLike) -> Iterator[Path]:
    """A path on this machine to write to. After the block it becomes `file`; if the block fails, `file` is unchanged.

    Several processes may write the same file at once: the last one wins. file: may be `gs://`; the content is copied
    there. Missing folders are made. Raises DiskFull in place of any error that means a full disk."""
    file = epath.Path(file)
    remote = "://" in os.fspath(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_name(owners.unfinished(file.name))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="flaxkd-")) if remote else None
        local = Path(folder, file.name) if remote else plain(Path(file.parent)) / work.name
        mode = None
        try:
            if not remote:
                local.touch()
                mode = local.stat().st_mode
            yield local
            if remote:
                with local.open("rb") as here, work.open("wb") as there:
                    shutil.copyfileobj(here, there, 2**20)
                work.replace(file)
            else:
                share(local, mode)
                replace(local, Path(file))
        except Exception as error:
            if not is_full(error):
                raise
            where = f"{file.parent} or {folder}" if remote else file.parent
            raise DiskFull(
                f"no space is left in {where} to write {file.name}. {free(local.parent)} were free after the first "
                f"{size(local.stat().st_size)} of it. Finished files are kept, the unfinished one is removed: make "
                "room, and run the same command again to resume"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # of a disk that was lost; the first error is the one to report
                work.unlink(missing_ok=True)


def share(file: Path, mode: int) -> None:
    """Gives a file the mode that the umask gives a new one; safetensors writes files that only their owner can read."""
    if file.stat().st_mode != mode:
        with contextlib.suppress(PermissionError):  # a file system without modes
            file.chmod(mode & 0o777)


def replace(new: Path, file: Path) -> None:
    """Renames `new` to `file`, which may exist. Some file systems of buckets cannot do that in one step."""
    try:
        new.replace(file)
    except OSError:
        if not file.is_file() or not new.is_file():
            raise
        file.unlink()
        new.rename(file)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill. After the block it replaces `out`; if the block fails, `out` is unchanged.

    What a killed process left of an earlier one is removed. Raises DiskFull in place of errors that mean a full
    disk."""
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    clear(out.parent)
    scratch = out.with_name(owners.unfinished(out.name))
    try:
        new = scratch / "new"
        new.mkdir(parents=True)
        (scratch / "name").write_bytes(os.fsencode(out.name))
        mode = (scratch / "name").stat().st_mode
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                share(file, mode)
        if out.exists():
            out.rename(scratch / "old")
        new.rename(out)
    except Exception as error:
        if not is_full(error):
            raise
        written = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
        raise DiskFull(
            f"no space is left in {out.parent} to write {out.name}. {free(out.parent)} were free after the first "
            f"{size(written)} of it. The unfinished folder is removed: make room, and run the same command again"
        ) from error
    finally:
        _restore(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def check_replaceable(out: Path, earlier: bool, what: str = "") -> None:
    """Raises ValueError if `out` holds anything but an earlier export, which the caller knows by its own marks.

    what: completes "an earlier export", as "to ONNX"."""
    if out.exists() and not earlier and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and is not {f'an earlier export {what}'.rstrip()}: choose a new folder")


def clear(folder: Path) -> None:
    """Removes unfinished files and folders of dead processes from `folder`. Those in its folders stay."""
    with contextlib.suppress(OSError):  # it only tidies up
        for entry in list(os.scandir(folder)):
            if entry.name.startswith(".") and owners.abandoned(entry.name, time.time() - entry.stat().st_mtime):
                _restore(Path(entry.path))
                shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)


def _restore(scratch: Path) -> None:
    """Gives back the folder that `whole_folder` was to replace, if it ended between its two renames."""
    if (scratch / "old").is_dir():
        out = scratch.with_name(os.fsdecode((scratch / "name").read_bytes()))
        if not out.exists():
            (scratch / "old").rename(out)


def write_text(file: os.PathLike, text: str) -> None:
    with whole(file) as path:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path in it may be no UTF-8


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
