"""What the commands share: where compiled programs are kept, what becomes of memory, and how an error is told."""

import contextlib
import ctypes
import os
import sys

import jax

from flaxkd.machine import files

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of malloc.h


def keep_compiled_programs() -> None:
    """In the folder of JAX_COMPILATION_CACHE_DIR, or flaxkd's own, so that the same command begins at once."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or files.cache_home() / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))


def keep_memory() -> None:
    """Lets a training step on a CPU have the memory of the step before. To be called before there are devices.

    glibc gives large blocks back, and they are faulted in again page by page: 65,000 pages and a fifth of the time of
    the miniature's step. It keeps them for the main thread alone, which is where XLA computes unless dispatch is
    asynchronous. Processes that wait for each other are left as they are."""
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu" and sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def told(*errors: type[Exception]):
    """Within it, these errors end the process with their message and status 1; FLAXKD_TRACEBACK lets them through."""
    try:
        yield
    except errors as error:
        if os.environ.get("FLAXKD_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
