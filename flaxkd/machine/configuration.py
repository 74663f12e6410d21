"""Configurations: the file that --config names, and its overrides --config.KEY=VALUE.

A configuration is a Python file with a function `get_config(argument=None)` that returns a ConfigDict. Whatever is
wrong is a ValueError of one line, with the file or key at fault and the nearest one that exists.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import re
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flaxkd.machine import diffusers_flags

# Groups whose keys differ from file to file, since they are the arguments of a function of optax or an architecture:
# {group: how another one is typed}.
OPEN = {
    "learning_rate": "--config.learning_rate=\"{'schedule': 'constant_schedule', 'value': 5e-5}\"",
    "optimizer": "--config.optimizer=\"{'name': 'adamw', 'weight_decay': 0.01}\"",
    "blank": "a file such as configs/vae.py",
}


# Switches that may also be one of these words.
WORDS = {"remat": ("blocks", "transformer_blocks"), "normalize_features": ("token",)}


def own() -> Path:
    """The folder of flaxkd's own configurations: beside the package in a clone, inside it in an installation."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def split(name: str) -> tuple[str, str | None]:
    """("configs/small.py", "sd15") for configs/small.py:sd15, and None for no argument. A folder may have a colon."""
    file, argument = re.fullmatch(r"(.*\.py|[^:]*)(?::(.*))?", name, re.DOTALL).groups() if name else ("", None)
    return file, argument


def find(file: str) -> Path:
    """The path of a configuration: of a file, or of one of flaxkd's own by its name: small or configs/small.py.

    Raises ValueError with the nearest names."""
    path = Path(file).expanduser().absolute()
    if path.suffix == ".py" and path.is_file():
        return path
    ours = {each.stem: each for each in sorted(own().glob("*.py")) if "\ndef get_config(" in each.read_text("utf-8")}
    if Path(file).parent in (Path(), Path("configs")) and path.suffix in ("", ".py") and path.stem in ours:
        return ours[path.stem]
    if path.is_file():
        raise ValueError(f"{file} is no Python file: give a configuration, e.g. configs/small.py")
    stems = {f"configs/{name}.py": name for name in ours}
    stems |= {str(Path(file).with_name(each.name)): each.stem for each in sorted(path.parent.glob("*.py")) if file}
    likely = difflib.get_close_matches(path.stem, stems.values(), 1)
    likely = [each for each, stem in stems.items() if stem in likely][-1:]
    what = f"{file or '.'} is a folder" if path.is_dir() else f"there is no file {file}"
    raise ValueError(f"{what}: {suggestion(likely) or 'give a configuration, e.g. configs/small.py'}")


def load(name: str) -> ConfigDict:
    """The configuration FILE[:ARGUMENT] before its overrides. Raises ValueError."""
    file, argument = split(name)
    path = find(file)
    failed = f"--config={name} cannot be read: "
    try:
        with importable(path):
            spec = importlib.util.spec_from_file_location("configuration", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            arguments = () if argument is None else (argument,)
            check_function(getattr(module, "get_config", None), *arguments)
            config = module.get_config(*arguments)
    except SyntaxError as error:
        raise ValueError(f"{failed}{error.filename or path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename == str(path)]
        where = f" ({path}, line {frames[-1].lineno})" if frames and not isinstance(error, ValueError) else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"{failed}{type(error).__name__}: {reason}{where}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{failed}its get_config returns a {type(config).__name__}, and not a ConfigDict")
    return config


def check_function(get_config: Any, *arguments: str) -> None:
    """Raises ValueError if `get_config` is no function of these arguments."""
    if not callable(get_config):
        raise ValueError("it has no function get_config(argument=None)")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"its get_config takes no argument: leave out :{arguments[0]}"
            if arguments
            else "its get_config needs an argument: --config=FILE:ARGUMENT"
        ) from error


@contextlib.contextmanager
def importable(file: Path) -> Iterator[None]:
    """In this context, `configs` and `flaxkd.configs` are the folder of flaxkd's own configurations, to import from.

    The folder of `file` goes before it if it is called configs too. Others of that name on the path come last."""
    beside = [file.parent.absolute()] if file.absolute().parent.name == "configs" else []
    others = [Path(each, "configs") for each in sys.path if Path(each, "configs").is_dir()]
    package = types.ModuleType("configs")
    package.__path__ = list(dict.fromkeys(str(each) for each in (*beside, own(), *others)))

    def forget() -> dict[str, types.ModuleType]:
        names = [name for name in sys.modules if re.match(r"(flaxkd\.)?configs(\.|$)", name)]
        return {name: sys.modules.pop(name) for name in names}

    before = forget()
    sys.modules |= {"configs": package, "flaxkd.configs": package}
    try:
        yield
    finally:
        forget()
        sys.modules |= before


def split_off(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other arguments, overrides as --config.KEY=VALUE). KEY may be followed by its value, or by none for a switch."""
    others, overrides, left = [], [], list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--config."):
            others.append(argument)
        elif "=" not in argument and left and re.match(r"[^-]|-[.\d]", left[0]):
            overrides.append(f"{argument}={left.pop(0)}")
        else:
            overrides.append(argument)
    return others, overrides


def configuration(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration FILE[:ARGUMENT] with overrides --config.KEY=VALUE. Its keys are then fixed.

    The last of equal keys counts, but lists add up. None is None for a key of any type. Raises ValueError."""
    config = load(name)
    lists: dict[str, tuple] = {}
    for override in split_off(overrides)[1]:
        key, equals, text = override.removeprefix("--config.").partition("=")
        group, last = locate(config, key)
        kind = group.get_type(last)
        if not equals and kind is not bool:
            raise ValueError(f"{override} has no value: give {override}=VALUE")
        try:
            value = text if text in WORDS.get(key, ()) else parse(kind, group[last], text if equals else "True")
        except ValueError as error:
            raise ValueError(f"{override}: invalid literal: {advice(config, key, str(error))}") from error
        if isinstance(value, tuple):
            value = lists[key] = lists.get(key, ()) + value
        with group.unlocked(), group.ignore_type():
            group[last] = value
    check_keys(name, config)
    return config.lock()


def locate(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The group that holds a key such as "sample.steps", and its name there. Raises ValueError with what was meant."""
    group, (*above, last) = config, key.split(".")
    for name in above:
        group = group.get(name) if isinstance(group, ConfigDict) else None
    if not isinstance(group, ConfigDict) or last not in group:
        raise ValueError(f"--config.{key}: {advice(config, key)}")
    return group, last


def keys(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"sample": group, "sample.steps": 25, ...}: all keys, a group before its own."""
    found = {}
    for key in config:
        found[prefix + key] = config[key]
        if isinstance(config[key], ConfigDict):
            found |= keys(config[key], f"{prefix}{key}.")
    return found


def advice(config: ConfigDict, key: str, wrong: str = "") -> str:
    """What to type for a key that does not exist, or whose value is `wrong`."""
    known, (group, _, name) = keys(config), key.rpartition(".")
    said = wrong or f"there is no key {key}"
    if (here := diffusers_flags.HERE.get(name.replace("-", "_"))) and not wrong:
        return f"{said}; {name} of other training scripts is here: {here}"
    inside = [each for each in known if each.startswith(f"{group}.")] if group else []
    if (likely := near(key, [each for each in known if each != group or not inside])) and not wrong:
        said += f". {suggestion(likely)}"
    if whole := next((each for each in (key, group) if each in OPEN and config.get(each)), None):
        now, another = config[whole].to_dict(), OPEN[whole]
        return f"{said}{' ' if said.endswith('?') else '; '}{whole} is {now}: give another one whole, e.g. {another}"
    if wrong or likely:
        return said
    return f"{said}; " + (f"{group} has {', '.join(inside)}" if inside else f"{own() / 'default.py'} has all keys")


def near(key: str, known: Sequence[str]) -> list[str]:
    """The known keys like `key`: spelt nearly so, of that name in another group, or nearly of that name."""
    last = {each: each.rpartition(".")[2] for each in known}
    name = key.rpartition(".")[2]
    likely = difflib.get_close_matches(key, last, 3, 0.75) or [each for each in last if last[each] == name]
    return likely or [each for each in last if last[each] in difflib.get_close_matches(name, last.values(), 1, 0.8)]


def suggestion(names: Sequence[str]) -> str:
    """A question that names them; "" for none."""
    return "Did you mean " + " or ".join(f'"{name}"' for name in names) + "?" if names else ""


# {type of a key: (what its value must be, its reader)}
BOOLS = {"true": True, "t": True, "1": True, "yes": True, "false": False, "f": False, "0": False, "no": False}
KINDS = {
    str: ("a text", str),
    bool: ("True or False", lambda text: BOOLS[text.lower()]),
    int: ("a whole number", lambda text: int(float(text)) if re.fullmatch(r"\d+e\d{1,2}", text) else int(text, 0)),
    float: ("a number", float),
}


def parse(kind: type, before: Any, text: str) -> Any:
    """The value of a key of type `kind`, whose value was `before`. Raises ValueError that says what is needed."""
    if text == "None":
        return None
    if kind in KINDS:
        needed, reader = KINDS[kind]
        try:
            return reader(text)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{needed} is needed") from error
    value = literal(text)
    if kind in (tuple, list):
        return kind(elements(value, before))
    if kind is ConfigDict and not isinstance(value, dict):
        raise ValueError(f"it is a group of keys, {', '.join(before)}")
    return ConfigDict(value) if isinstance(value, dict) else value


def literal(text: str) -> Any:
    """A literal of Python, or else the text itself. Raises ValueError for a list whose quotes a shell has taken."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        balanced = all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}"))
        if re.fullmatch(r"[(\[{][^()\[\]{}]*[)\]}]", text) or (text[:1] in ("(", "[", "{") and not balanced):
            raise ValueError(
                """a list in quotes is needed, as in "--config.sample.prompts=('red apple','blue heart')\""""
            ) from None
        return text


def elements(value: Any, before: Sequence) -> tuple:
    """A value as a tuple whose elements have the type of those in `before`. Raises ValueError."""
    value = tuple(value) if isinstance(value, list | tuple | set) else (value,)
    kinds = {type(each) for each in before}
    if kinds == {float}:
        value = tuple(float(each) if type(each) is int else each for each in value)
    wrong = [each for each in value if kinds and type(each) not in kinds]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not {' or '.join(KINDS[kind][0] for kind in kinds if kind in KINDS)}")
    return value


def check_keys(name: str, config: ConfigDict) -> None:
    """Compares the keys with those of configs/default.py: a key misspelt in the file would be without effect.

    A task of one's own may have keys of its own. Raises ValueError."""
    closed = lambda found: {key for key in found if not key.startswith(tuple(f"{group}." for group in OPEN))}
    default = load(str(own() / "default.py"))
    given, known = closed(keys(config)), closed(keys(default))
    missing = sorted(known - given)
    if missing:
        raise ValueError(f"--config={name} lacks {', '.join(missing)}: begin with default.get_config()")
    foreign = ":" in (config.task or "")
    for key in sorted(given - known):
        if not foreign or difflib.get_close_matches(key, known, 1, 0.9):
            raise ValueError(f"--config={name}: {advice(default, key)}")
