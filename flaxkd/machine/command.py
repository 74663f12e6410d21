"""What the commands share: their flags, the cache of compiled programs, and how an error is reported."""

import argparse
import ast
import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from flaxkd.machine import files

MODEL = "pipeline folder, hub id (owner/name) or workdir of a training"

# {flag: options of argparse} of those that several commands have. A command may add to them or change them.
FLAGS = {
    "config": {"help": "configuration, e.g. configs/small.py; --config.KEY=VALUE overrides a key"},
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


def parse(parser: Parser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """The flags of a command with --config, and the configuration with its overrides `--config.key=value`.

    Raises ValueError like `configuration`."""
    args, overrides = parser.parse_known_args(arguments)
    return args, configuration(args.config, check_overrides(parser, overrides))


def check_overrides(parser: Parser, overrides: list[str]) -> list[str]:
    """The arguments left for the configuration. Ends the process if one of them is for nothing."""
    for before, other in itertools.pairwise(["", *overrides]):
        value = before.startswith("--config.") and "=" not in before and not other.startswith("-")
        if not (other.startswith("--config.") or value):
            parser.error(f"unrecognized argument: {other} (keys of the configuration are --config.KEY=VALUE)")
    return overrides


def configuration(file: str, overrides: Sequence[str]) -> ConfigDict:
    """The configuration `FILE.py[:ARGUMENT]` with overrides `--config.key=value`, whose keys are then fixed.

    Raises ValueError with the file or key at fault."""
    values, typed = flags.FlagValues(), ["flaxkd", f"--config={file}", *overrides]
    if not Path(file.partition(":")[0]).is_file():
        raise ValueError(f"there is no file {file.partition(':')[0]}: give a configuration, e.g. configs/small.py")
    try:
        config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=typed)
        values(typed)
    except (AttributeError, OSError, flags.Error) as error:  # the first is a key that does not exist
        reason = str(error).strip()
        if reason[:1] in ("'", '"') and reason[-1:] == reason[:1]:  # ml_collections quotes what a KeyError says
            reason = ast.literal_eval(reason)
        reason = reason.splitlines()
        # The error of a configuration's own code comes with its traceback.
        reason = reason[-1:] if any(line.startswith("Traceback") for line in reason) else reason
        raise ValueError(f"--config={file} and its overrides cannot be read: " + "\n".join(reason)) from error
    return values.config


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
