"""Shared by the commands: flags, stored compiled programs, and how a command ends."""

import argparse
import contextlib
import difflib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ml_collections import ConfigDict

from flaxkd.machine import diffusers_flags, dtypes, files
from flaxkd.machine.configuration import configuration, keys, load, near, split_off, suggestion

PIPELINE = "pipeline folder, single-file checkpoint or hub id (owner/name)"
MODEL = f"{PIPELINE}, or workdir of a run"


class Once(argparse.Action):
    """Stores a value, and refuses a second one."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before is not self.default:
            raise ValueError(f"{option_string} is given twice: {before} and {values}")
        setattr(namespace, self.dest, values)


class Several(argparse.Action):
    """A list, one value at a time: `--model A --model B`. `--model A B` and, with `commas`, `A,B` are still taken."""

    def __init__(self, *args, commas: bool = False, **kwargs):
        self.commas = commas
        super().__init__(*args, nargs="+", **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        added = [name for value in values for name in value.split(",") if name] if self.commas else values
        setattr(namespace, self.dest, [*(() if before is self.default else before), *added])


# {flag: options of argparse} of flags shared by several commands. A command may add options or change them.
FLAGS = {
    "config": {
        "action": Once,
        "metavar": "FILE[:ARGUMENT]",
        "help": "configuration, e.g. configs/small.py; --config.KEY=VALUE overrides a key of it (configs/default.py)",
    },
    "model": {"help": f"{MODEL}; default: the embedded teacher"},
    "teacher": {"help": f"{MODEL}; default: the embedded teacher"},
    "vae": {"help": "another autoencoder than the model's own: folder, file or hub id (owner/name)"},
    "lora": {
        "action": Several,
        "default": (),
        "metavar": "FILE[:SCALE]",
        "help": "LoRA file of any dialect, and how much of it; repeat for several; default: none",
    },
    "students": {
        "action": Several,
        "commas": True,
        "metavar": "STUDENT",
        "help": "a row of python -m flaxkd.students; repeat for several, default: all",
    },
    "out": {"type": Path, "help": "default: %(default)s"},
    "seed": {"type": int, "default": 0, "help": "default: %(default)s"},
    "steps": {"type": int, "help": "of the sampler; default: %(default)s"},
    "guidance": {"type": float, "help": "how far towards the prompt, 1 is none; default: the model's own"},
    "batch-size": {"type": int, "help": "pictures at a time; default: %(default)s"},
    "clip-skip": {
        "type": int,
        "default": 0,
        "help": "last layers of the text encoder to leave out, as in diffusers: "
        "1 is what other programs call clip skip 2; default: 0",
    },
    "dtype": {"type": dtypes.spelt, "choices": dtypes.NAMES, "help": "default: bfloat16; float32 on a CPU"},
}


class Help(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """A list is shown as it should be typed."""
        one = isinstance(action, Several)
        return action.metavar or default_metavar if one else super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """Takes `--batch_size` for `--batch-size`, and former names of flags, such as {"--reference": "--teacher"}.

    A mistake is one line, with the nearest flag."""

    renamed: dict[str, str]
    typed: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        self.typed = [self._today(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(self.typed, namespace)

    def parse_args(self, args=None, namespace=None):
        namespace, unknown = self.parse_known_args(args, namespace)
        return self.refuse(unknown[0]) if unknown else namespace

    def error(self, message):
        words = (arg for arg in self.typed if arg.startswith("-") and arg.lstrip("-")[:1].isalpha())
        unknown = [arg for arg in words if arg.partition("=")[0] not in self._option_string_actions]
        if "required" in message and unknown:  # a misspelt flag is why another one is missing
            self.refuse(unknown[0])
        message = message.replace("required: --config", "required: --config, e.g. --config configs/small.py")
        self.exit(2, f"error: {message}\n")

    def refuse(self, arg: str) -> NoReturn:
        self.exit(2, f"error: unrecognized argument: {arg}{self._advice(arg)}\n")

    def _today(self, arg: str) -> str:
        flag, equals, value = arg.partition("=")
        hyphens = flag.replace("_", "-")
        if flag.startswith("--") and hyphens in self._option_string_actions:
            flag = hyphens
        return self.renamed.get(flag, flag) + equals + value

    def _advice(self, arg: str) -> str:
        """What was meant by an unknown argument: a flag, a key of the configuration, or a value without its quotes."""
        name, equals, value = arg.lstrip("-").partition("=")
        options = [flag for flag in self._option_string_actions if flag.startswith("--")]
        flags = difflib.get_close_matches(f"--{name.replace('_', '-')}", options, 1, 0.75)
        if "--config" in options and name and (name.startswith("config.") or not flags):
            key = name.removeprefix("config.").replace("-", "_")
            if here := diffusers_flags.HERE.get(key):
                return f"; {name} of other training scripts is here: {here}"
            flags = [f"--config.{each}" for each in near(key, keys(load("default")))]
        if flags:
            return f". {suggestion([flag + equals + value for flag in flags])}"
        return "; --help lists all flags" if arg.startswith("-") else "; a value with spaces or brackets needs quotes"


def parser(module: str, doc: str, renamed: dict[str, str] | None = None, **kwargs) -> Parser:
    """A parser for `python -m {module}`. Its help begins with the module's docstring."""
    kwargs = {"formatter_class": Help, "allow_abbrev": False} | kwargs
    made = Parser(
        prog=sys.argv[0] if sys.argv[0].startswith("flaxkd ") else f"python -m {module}", description=doc, **kwargs
    )
    made.renamed = renamed or {}
    return made


def add(to: argparse._ActionsContainer, *names: str, **options) -> None:
    """Adds flags of FLAGS to a parser or one of its groups; `options` replace those of the table."""
    for name in names:
        to.add_argument(f"--{name}", **FLAGS[name] | options)


def refuse(parser: Parser, args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Ends with a usage error if one of these options, by their long names, was given where it does nothing."""
    dest = lambda name: name.removeprefix("--").replace("-", "_")
    if given := [name for name in names if getattr(args, dest(name)) != parser.get_default(dest(name))]:
        parser.error(f"{', '.join(given)}: {why}")


def parse(parser: Parser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """The flags of a command with --config, and the configuration with its overrides `--config.key=value`.

    args.overrides are the latter as typed. Ends the process for a wrong flag, and raises ValueError for the rest."""
    others, overrides = split_off(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(others)
    args.overrides = overrides
    return args, configuration(args.config, overrides)


def keep_compiled_programs(folder: str | None = None) -> None:
    """Stores them in `folder`, by default JAX_COMPILATION_CACHE_DIR or flaxkd's own: the same command then starts at
    once. If nothing can be written there, a warning says so; JAX would warn at every program."""
    import jax

    try:
        cache = str(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or files.cache_home() / "jax")
        if "://" not in cache:
            cache = os.path.expanduser(cache)
            os.makedirs(cache, exist_ok=True)
            if not os.access(cache, os.W_OK):
                raise PermissionError(f"{cache} is not writable")
    except OSError as error:
        print(f"warning: compiled programs are not kept, the next start compiles again: {error}", file=sys.stderr)
    else:
        jax.config.update("jax_compilation_cache_dir", cache)


RESUMES = "stopped; the same command resumes"

# What a person can fix: a setting, a file, a full disk, a missing package, a run that went wrong.
REPORTED = (ValueError, OSError, ImportError, FloatingPointError)


def first_line(error: Exception) -> str:
    """An error of a library, whose message may be long: its kind, and the first line."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


@contextlib.contextmanager
def reported(interrupted: str = "interrupted") -> Iterator[None]:
    """In this context, and in a function that it decorates, a command ends as people expect.

    These errors end the process with one message and status 1, FLAXKD_TRACEBACK lets them pass. Ctrl-C ends it with
    the message `interrupted` and status 130. A reader that has gone, such as `head`, ends it in silence, with 141. What
    the output cannot encode is escaped. A warning is one line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == "flaxkd":  # that of the start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads it
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a failure is found here, and not after the end
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush after the end
        sys.exit(141)
    except REPORTED as error:
        if os.environ.get("FLAXKD_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
