"""What the commands share: their flags, the cache of compiled programs, and how an error is reported."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from flaxkd.machine import files

MODEL = "pipeline folder, hub id (owner/name) or workdir of a training"

# {flag: options of argparse} of those that several commands have. A command may add to them or change them.
FLAGS = {
    "model": {"help": f"{MODEL}; default: the embedded teacher"},
    "teacher": {"help": f"{MODEL}; default: the embedded teacher"},
    "out": {"type": Path, "help": "default: %(default)s"},
    "seed": {"type": int, "default": 0, "help": "default: %(default)s"},
    "steps": {"type": int, "default": 25, "help": "calls of the UNet, pndm makes one more; default: %(default)s"},
    "batch-size": {"type": int, "help": "pictures at a time; default: %(default)s"},
    "dtype": {"choices": ["float32", "bfloat16", "float16"], "help": "default: bfloat16, float32 on a CPU"},
}


class Parser(argparse.ArgumentParser):
    """Takes `--batch_size` for `--batch-size`, and what flags were called before: {"--reference": "--teacher"}."""

    renamed: dict[str, str]

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._today(arg) for arg in args], namespace)

    def _today(self, arg: str) -> str:
        flag, equals, value = arg.partition("=")
        hyphens = flag.replace("_", "-")
        if flag.startswith("--") and hyphens in self._option_string_actions:
            flag = hyphens
        return self.renamed.get(flag, flag) + equals + value


def parser(module: str, doc: str, renamed: dict[str, str] | None = None, **kwargs) -> Parser:
    """A parser for `python -m {module}`, whose help begins with the module's docstring."""
    kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs
    made = Parser(prog=f"python -m {module}", description=doc, **kwargs)
    made.renamed = renamed or {}
    return made


def add(to: argparse._ActionsContainer, *names: str, **options) -> None:
    """Adds flags of FLAGS to a parser or a group of it; `options` replace those of the table."""
    for name in names:
        to.add_argument(f"--{name}", **FLAGS[name] | options)


def underscored(arguments: Sequence[str], known) -> list[str]:
    """Arguments for absl, whose flags have underscores: `--coordinator-address` is `--coordinator_address`.

    known: the flags of absl."""

    def today(arg: str) -> str:
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        return f"--{name}{equals}{value}" if flag.startswith("--") and name in known else arg

    return [today(arg) for arg in arguments]


def keep_compiled_programs() -> None:
    """In the folder of JAX_COMPILATION_CACHE_DIR, or flaxkd's own, so that the same command begins at once."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or files.cache_home() / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))


# What a person can mend: a setting, a file, a full disk, a missing package, a run that went wrong.
REPORTED = (ValueError, OSError, ImportError, FloatingPointError)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Within it, these errors end the process with one message and status 1; FLAXKD_TRACEBACK lets them through."""
    try:
        yield
    except REPORTED as error:
        if os.environ.get("FLAXKD_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
