"""Shared by the commands: flags, stored compiled programs, and how errors are reported."""

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

from flaxkd.machine import diffusers_flags, files

MODEL = "pipeline folder, hub id (owner/name) or workdir of a run"

# {flag: options of argparse} of flags shared by several commands. A command may add options or change them.
FLAGS = {
    "config": {"help": "configuration, e.g. configs/small.py; --config.KEY=VALUE overrides a key"},
    "model": {"help": f"{MODEL}; default: the embedded teacher"},
    "teacher": {"help": f"{MODEL}; default: the embedded teacher"},
    "out": {"type": Path, "help": "default: %(default)s"},
    "seed": {"type": int, "default": 0, "help": "default: %(default)s"},
    "steps": {"type": int, "default": 25, "help": "UNet calls, plus one for pndm; default: %(default)s"},
    "batch-size": {"type": int, "help": "pictures at a time; default: %(default)s"},
    "clip-skip": {
        "type": int,
        "default": 0,
        "help": "last layers of the text encoder to leave out, as in diffusers: "
        "1 is what other programs call clip skip 2; default: 0",
    },
    "dtype": {"choices": ["float32", "bfloat16", "float16"], "help": "default: bfloat16; float32 on a CPU"},
}


class Parser(argparse.ArgumentParser):
    """Takes `--batch_size` for `--batch-size`, and former names of flags, such as {"--reference": "--teacher"}."""

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
    """A parser for `python -m {module}`. Its help begins with the module's docstring."""
    kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter} | kwargs
    made = Parser(prog=f"python -m {module}", description=doc, **kwargs)
    made.renamed = renamed or {}
    return made


def add(to: argparse._ActionsContainer, *names: str, **options) -> None:
    """Adds flags of FLAGS to a parser or one of its groups; `options` replace those of the table."""
    for name in names:
        to.add_argument(f"--{name}", **FLAGS[name] | options)


def parse(parser: Parser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """The flags of a command with --config, and the configuration with its overrides `--config.key=value`.

    Raises ValueError, as `configuration` does."""
    args, overrides = parser.parse_known_args(arguments)
    return args, configuration(args.config, check_overrides(parser, overrides))


def check_overrides(parser: Parser, overrides: list[str]) -> list[str]:
    """The overrides of the configuration. Ends the process if another argument is among them."""
    for before, other in itertools.pairwise(["", *overrides]):
        value = before.startswith("--config.") and "=" not in before and not other.startswith("-")
        if not (other.startswith("--config.") or value):
            parser.error(f"unrecognized argument: {other} (keys of the configuration are --config.KEY=VALUE)")
    return overrides


def configuration(file: str, overrides: Sequence[str]) -> ConfigDict:
    """The configuration `FILE.py[:ARGUMENT]` with overrides `--config.key=value`. Its keys are then fixed.

    `--config.key=None` is None for a key of any type. Raises ValueError with the file or key at fault."""
    overrides = _joined(overrides)
    nones = [override for override in overrides if override.endswith("=None")]
    values, typed = flags.FlagValues(), ["flaxkd", f"--config={file}", *(x for x in overrides if x not in nones)]
    if not Path(file.partition(":")[0]).is_file():
        raise ValueError(f"there is no file {file.partition(':')[0]}: give a configuration, e.g. configs/small.py")
    try:
        config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=typed)
        values(typed)
        values.config.update_from_flattened_dict(dict.fromkeys(map(_key, nones)))
    except (AttributeError, KeyError, ValueError, OSError, flags.Error) as error:  # the first is an unknown key
        reason = str(error).strip()
        if reason[:1] in ("'", '"') and reason[-1:] == reason[:1]:  # ml_collections quotes a KeyError
            reason = ast.literal_eval(reason)
        reason = reason.splitlines()
        # The error of a configuration's own code comes with its traceback.
        reason = reason[-1:] if any(line.startswith("Traceback") for line in reason) else reason
        reason = "\n".join([*reason, *_advice(file, overrides)])
        raise ValueError(f"--config={file} and its overrides cannot be read: {reason}") from error
    return values.config


def _joined(overrides: Sequence[str]) -> list[str]:
    """The overrides with their values: `--config.key value` as `--config.key=value`."""
    joined: list[str] = []
    for word in overrides:
        if joined and "=" not in joined[-1] and not word.startswith("--config."):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _key(override: str) -> str:
    return override.removeprefix("--config.").partition("=")[0]


def _advice(file: str, overrides: Sequence[str]) -> list[str]:
    """What to type instead of the keys that a configuration does not have, as far as is known."""
    advice = []
    for key in map(_key, overrides):
        group, _, name = key.rpartition(".")
        with contextlib.suppress(ValueError):  # if the file itself is at fault
            config = configuration(file, ())
            found = config.get(group) if group else config
            if key not in OPEN and isinstance(found, ConfigDict) and name in found:
                continue
            if whole := next((k for k in (key, group) if k in OPEN), None):
                advice.append(f"{whole} is {dict(config[whole])}: give another one whole, e.g. {OPEN[whole]}")
            elif here := diffusers_flags.HERE.get(name.replace("-", "_")):
                advice.append(f"{name} of other training scripts is here: {here}")
    return advice


# Groups whose keys are the arguments of a function of optax, each with another one.
OPEN = {
    "learning_rate": "--config.learning_rate=\"{'schedule': 'constant_schedule', 'value': 5e-5}\"",
    "optimizer": "--config.optimizer=\"{'name': 'adamw', 'weight_decay': 0.01}\"",
}


def keep_compiled_programs() -> None:
    """Stores them in JAX_COMPILATION_CACHE_DIR or flaxkd's own folder: the same command then starts at once."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or files.cache_home() / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))


# What a person can fix: a setting, a file, a full disk, a missing package, a run that went wrong.
REPORTED = (ValueError, OSError, ImportError, FloatingPointError)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """In this context, these errors end the process with one message and status 1; FLAXKD_TRACEBACK lets them pass."""
    try:
        yield
    except REPORTED as error:
        if os.environ.get("FLAXKD_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
