"""Orbax checkpoints on disk: the newest one that can be read, and a full disk reported as such."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def newest(folder: Path, steps: Iterable[int], read: Callable[[int], Any]) -> tuple[int, Any] | None:
    """(step, what `read` gives) of the newest of these steps that can be read; None if there are none.

    A broken one, as a full disk or a power cut leaves it, is passed over with a warning. Raises ValueError, with what
    was wrong of each, if there are steps but none can be read."""
    broken = {}
    for step in sorted(steps, reverse=True):
        try:
            return step, read(step)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a file cut short
            broken[step] = in_a_line(error)
            logging.warning("checkpoint %s/%s cannot be read, taking the one before: %s", folder, step, broken[step])
    if broken:
        lines = "".join(f"\n  {step}: {error}" for step, error in broken.items())
        raise ValueError(f"no checkpoint in {folder} can be read:{lines}")
    return None


@contextlib.contextmanager
def written(folder: Path, whole: Callable[[], Iterable[int]]) -> Iterator[None]:
    """Within it, whatever Orbax raises becomes an OSError that says what is left and what to do: a disk may be full.

    whole: the steps that are there and whole."""
    try:
        yield
    except Exception as error:  # of many kinds, from threads of Orbax and TensorStore
        free = shutil.disk_usage(folder).free / 2**30
        newest = max(whole(), default=None)
        raise OSError(
            f"a checkpoint cannot be written to {folder}, which has {free:.1f} GiB free: {in_a_line(error)}\n"
            f"The newest whole one is {'none' if newest is None else f'that of step {newest}'}. Make room, or lower "
            "checkpoint.keep; the same command goes on from there."
        ) from error


def in_a_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
