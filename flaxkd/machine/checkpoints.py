"""Orbax checkpoints on disk: the newest readable one, and a clear error for a full disk."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


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
def written(folder: Path, whole: Callable[[], Iterable[int]]) -> Iterator[None]:
    """In this context, any error of Orbax becomes an OSError that says what is left and what to do: a disk may be full.

    whole: gives the steps with whole checkpoints."""
    try:
        yield
    except Exception as error:  # of many kinds, from threads of Orbax and TensorStore
        free = shutil.disk_usage(folder).free / 2**30
        newest = max(whole(), default=None)
        raise OSError(
            f"a checkpoint cannot be written to {folder}, which has {free:.1f} GiB free: {in_a_line(error)}\n"
            f"The newest whole one is {'none' if newest is None else f'that of step {newest}'}. Make room, or lower "
            "checkpoint.keep; the same command resumes there."
        ) from error


def in_a_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
