"""Orbax checkpoints on disk: the newest good one, what was written, and clear errors for disks and paths that fail."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from flaxkd.machine import files, hosts

_failed = threading.Event()  # set by `written`


def newest(folder: Path, steps: Iterable[int], read: Callable[[int], Any]) -> tuple[int, Any] | None:
    """(step, what `read` gives) for the newest readable one of these steps; None if there are no steps.

    A checkpoint broken by a full disk or a power cut is skipped with a warning. Raises ValueError, with the error of
    each, if there are steps but none can be read."""
    broken = {}
    for step in sorted(steps, reverse=True):
        try:
            return step, read(step)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a file cut short
            broken[step] = in_a_line(error)
            logging.warning("checkpoint %s/%s cannot be read, using the one before: %s", folder, step, broken[step])
    if broken:
        lines = "".join(f"\n  {step}: {error}" for step, error in broken.items())
        raise ValueError(f"no checkpoint in {folder} can be read:{lines}")
    return None


@contextlib.contextmanager
def written(folder: Path, whole: Callable[[], Iterable[int]], needed: int | None = None) -> Iterator[None]:
    """In this context, any error of Orbax becomes an OSError that says what is left and what to do: a disk may be full.

    whole: gives the steps with whole checkpoints. needed: bytes of a checkpoint before compression, if known."""
    try:
        yield
    except Exception as error:  # of many kinds, from threads of Orbax and TensorStore
        _failed.set()
        newest = max(whole(), default=None)
        takes = "" if needed is None else f"; a checkpoint takes up to {files.size(needed)}"
        raise OSError(
            f"a checkpoint cannot be written to {folder}, which has {files.free(folder)} free{takes}: "
            f"{in_a_line(error)}\n"
            f"The newest whole one is {'none' if newest is None else f'that of step {newest}'}. Make room, or lower "
            "checkpoint.keep; the same command resumes there."
        ) from error


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """In this context, an error ends the process at once if a save has failed: threads of Orbax would still wait for
    it, for minutes. Nor do they print what is reported here in one line."""
    before, sys.unraisablehook = sys.unraisablehook, _unless_of_a_failed_save
    try:
        yield
    except BaseException as error:
        if _failed.is_set():
            hosts.leave(error)
        raise
    finally:
        sys.unraisablehook = before


def _unless_of_a_failed_save(unraisable) -> None:
    """Prints what nobody catches, but not that TensorStore wants to tell a save that has failed already."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def names(item: Path) -> dict[str, bool]:
    """{name: whether it has arrays} of the branches of a saved tree; {} if it is something else."""
    saved = ocp.PyTreeCheckpointHandler().metadata(files.plain(item)).tree
    return {name: bool(branch) for name, branch in saved.items()} if isinstance(saved, dict) else {}


def read(item: Path, names: Iterable[str]) -> dict:
    """{name: tree of numpy arrays} of these branches of a saved tree, by this process alone. The rest is not read."""
    handler, item = ocp.PyTreeCheckpointHandler(), files.plain(item)
    saved = handler.metadata(item).tree
    tree = {name: jax.tree.map(lambda _: 0, saved[name]) for name in names}
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return handler.restore(item, args=ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True))


def read_scalar(item: Path, name: str) -> int:
    """A saved scalar, read without the metadata of all the others: cheap enough for every save."""
    base = {"driver": "file", "path": f"{files.plain(item)}/"}
    spec = {"driver": "auto", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
    return int(tensorstore.open(spec, read=True).result().read().result())


def check_finite(tree: Any, infinite: bool = False) -> None:
    """Raises ValueError, with the first name, if this process's part of an array holds NaN, or infinity.

    infinite: infinity may be. Arrays on devices are copied one after another."""
    for path, array in jax.tree.leaves_with_path(tree):
        for part in [shard.data for shard in array.addressable_shards] if isinstance(array, jax.Array) else [array]:
            values = np.asarray(part)
            if jax.numpy.issubdtype(values.dtype, np.floating):
                values = values if values.dtype.itemsize >= 4 else values.astype(np.float32)
                if not (~np.isnan(values) if infinite else np.isfinite(values)).all():
                    raise ValueError(f"{jax.tree_util.keystr(path, simple=True, separator='.')} holds NaN or infinity")


def in_a_line(error: Exception) -> str:
    """Why it failed: the first line, or the system's own words where a library wraps them in many."""
    if full := [words for words in files.FULL if words in str(error)]:
        return full[0].lower()
    return str(error).strip().partition("\n")[0] or type(error).__name__
