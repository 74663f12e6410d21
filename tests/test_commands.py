"""All commands: their help, the commands that the documents advise, and what an installation has of them."""

import ast
import fnmatch
import importlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import flaxkd
from flaxkd import __main__ as commands
from flaxkd.machine import command
from flaxkd.machine.configuration import configuration, split_off
from tests.running import ROOT, wait_for

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "launch/README.md")),
    *(ROOT / "docs").glob("*.md"),
]
SOURCES = [path for folder in ("flaxkd", "convert", "configs") for path in (ROOT / folder).rglob("*.py")]
every_command = pytest.mark.parametrize("name", commands.COMMANDS)


class Made(Exception):
    """Carries a parser out of a command that would begin to work."""


def parser(name: str) -> command.Parser:
    def stop(self, *_):
        raise Made(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.Parser, "parse_known_args", stop)
        with pytest.raises(Made) as made:
            importlib.import_module(commands.module(name)).main([])
    return made.value.args[0]


@every_command
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: flaxkd {name}")
    for action in parser(name)._actions:
        assert action.help and all(flag in shown for flag in action.option_strings)
        assert not any("_" in flag for flag in action.option_strings)
        assert not (action.nargs == "+" and not isinstance(action, command.Several)), "a list is a flag again"


def test_every_command_is_listed(capsys):
    runs = {path for path in SOURCES if "\ndef main(" in path.read_text("utf-8")} - {ROOT / "flaxkd" / "__main__.py"}
    names = {module.replace(".", "/") + ".py" for module, _ in commands.COMMANDS.values()}
    assert names == {str(path.relative_to(ROOT)) for path in runs}
    commands.main([])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in commands.COMMANDS)
    commands.main(["--version"])
    assert capsys.readouterr().out == f"flaxkd {flaxkd.__version__}\n"
    with pytest.raises(SystemExit, match=r'^error: there is no command trian. Did you mean "train"\?$'):
        commands.main(["trian"])


def advised(path: Path) -> list[tuple[str, list[str]]]:
    """(command, words after it) of every command of flaxkd in a document, up to a pipe, a comment or prose."""
    text = path.read_text("utf-8").replace("\\\n", " ")
    start = rf"(?:python -m (flaxkd|convert)\b([\w.]*)|(?:^|`) *flaxkd(?= (?:{'|'.join(commands.COMMANDS)})\b))"
    found = []
    for package, module, rest in re.findall(rf"{start}((?: +[^`#|&\s]+)*)", text, re.MULTILINE):
        words = shlex.split(rest[: rest.rindex('"')] if rest.count('"') % 2 else rest)
        module = f"{package}{module}".rstrip(".")
        names = {path.removesuffix(".__main__"): name for name, (path, _) in commands.COMMANDS.items()}
        found.append((names[module], words) if module not in ("", "flaxkd") else (words[0], words[1:]))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_advise_commands_that_exist(path):
    for name, words in advised(path):
        if name.startswith("--"):
            continue  # flaxkd --help
        others, overrides = split_off([word.strip("[]") if word[:3] == "[--" else word for word in words])
        unknown = {word.partition("=")[0] for word in others if word.startswith("--")} - {
            *parser(name)._option_string_actions
        }
        assert not unknown, f"{name} {shlex.join(words)}"
        named = [after for word, after in itertools.pairwise(others) if word == "--config"] or ["configs/small.py"]
        for file in named:
            configuration("configs/small.py" if file in ("...", "FILE") else file, overrides)


def test_commands_are_found_in_documents():
    """Or the test above would pass on nothing."""
    found = [name for path in DOCUMENTS for name, _ in advised(path)]
    assert len(found) > 30 and {*found} >= {*commands.COMMANDS} - {"from-diffusers"}


@every_command
def test_what_a_command_writes_by_default_is_ignored_by_git(name):
    patterns = [line.strip("/") for line in (ROOT / ".gitignore").read_text("utf-8").splitlines() if line[:1] == "/"]
    for action in parser(name)._actions:
        if isinstance(action.default, Path):
            assert any(fnmatch.fnmatch(action.default.parts[0], pattern) for pattern in patterns), action.default


def test_an_installation_has_every_folder_and_no_foreign_name():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "flaxkd").rglob("__init__.py")]
    folders = {".".join(folder.parts) for folder in folders} | {"flaxkd.configs", "flaxkd.convert"}
    assert {*listed["packages"]} == folders
    assert listed["package-dir"] == {"flaxkd.configs": "configs", "flaxkd.convert": "convert"}
    assert not [path for path in SOURCES if not (path.parent / "__init__.py").is_file()]


def test_the_constraints_are_names_and_versions_of_what_is_needed():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = {re.match(r"[A-Za-z0-9_-]+", each).group().lower().replace("_", "-") for each in needed} - {"flaxkd"}
    assert names <= {line.partition("==")[0] for line in lines}


def test_ctrl_c_while_a_command_imports_is_one_line(tmp_path):
    slow = f"import pathlib, time; pathlib.Path({str(tmp_path / 'here')!r}).touch(); time.sleep(60)"
    (tmp_path / "jax.py").write_text(slow)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    typed = [sys.executable, "-m", "flaxkd.students"]
    process = subprocess.Popen(typed, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "here", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].split() == ["interrupted"] and process.returncode == 130


def test_a_reader_that_goes_and_letters_that_cannot_be_shown_end_no_command():
    shown = subprocess.run(f"{sys.executable} -m flaxkd | true", cwd=ROOT, shell=True, capture_output=True, text=True)
    assert shown.stderr == ""
    code = r"from flaxkd.machine import command as c; c.reported()(print)('caf\u00e9 \udcff')"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("caf\\xe9 \\udcff\n", 0)


def bare(call: ast.Call) -> bool:
    """Whether a call reads or writes text as the locale has it."""
    name, keywords = getattr(call.func, "attr", getattr(call.func, "id", "")), {each.arg for each in call.keywords}
    words = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    if keywords & {"encoding", "fileobj"} or ast.unparse(call.func) == "os.open":
        return False
    if name == "open":
        method = isinstance(call.func, ast.Attribute)
        return "b" not in "".join(words[-1:]) and (not method or len(words) == len(call.args))
    if name == "write_text":
        return ast.unparse(call.func) not in ("files.write_text", "write_text")
    return "text" in keywords if name in ("run", "Popen") else name == "read_text" and not words


def test_text_is_read_and_written_as_utf_8():
    """Whatever the locale."""
    calls = ((path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf-8"))))
    found = [f"{path}:{node.lineno}" for path, node in calls if isinstance(node, ast.Call) and bare(node)]
    assert not found
    assert bare(ast.parse("path.open('a')").body[0].value) and bare(ast.parse("path.read_text()").body[0].value)
