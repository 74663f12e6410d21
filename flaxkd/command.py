"""What the commands share: where compiled programs are kept, and how an error is told."""

import contextlib
import os
import sys

import jax

from flaxkd.data import sources


def keep_compiled_programs() -> None:
    """In the folder of JAX_COMPILATION_CACHE_DIR, or flaxkd's own, so that the same command begins at once."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or sources.cache_home() / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))


@contextlib.contextmanager
def told(*errors: type[Exception]):
    """Within it, these errors end the process with their message and status 1; FLAXKD_TRACEBACK lets them through."""
    try:
        yield
    except errors as error:
        if os.environ.get("FLAXKD_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
