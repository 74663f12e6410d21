"""What a process asks of an NVIDIA GPU. Without one, nothing here has an effect."""

import os

MEMORY = 0.93  # of a GPU, for XLA: the rest is for its context, cuDNN and NCCL
NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older


def take_memory() -> None:
    """Gives XLA nearly all of the memory, of which it would take three quarters. What is set in the environment counts.

    To be called before the process uses a device."""
    if not any(os.environ.get(name) for name in NAMES):
        os.environ[NAMES[0]] = str(MEMORY)
