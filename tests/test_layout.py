"""The shape of the repository: data flows one way, files stay short, and torch is for tests and scores alone."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.running import ROOT

FOLDERS = ("flaxkd", "configs", "convert", "tests")

# A folder imports from lines above its own and from itself; the commands, files at the root and every __main__.py, from
# all of them.
ORDER = (
    ("models", "machine", "weights"),  # networks know neither files nor losses nor data, trees of weights no networks
    ("pretrained",),
    ("diffusion", "students", "data"),
    ("export",),
    ("drawing",),
    ("training",),
    ("tasks",),
    ("evaluate", "plan", "choosing"),
    ("bench", "ablation", "convert", "serve"),
)

# What may use torch, within functions: the scores of the extra `eval`, the benchmark's other side, PyTorch's exporter.
SCORES, SUBJECT = "flaxkd.evaluate.scores", "flaxkd.evaluate.subject"
RIVAL, ONNX = "flaxkd.bench.torch_works", "flaxkd.export.onnx"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}
OURS = {name for name in FILES if not name.startswith("tests")}


def imports(name: str) -> set[str]:
    """All modules that a file imports, wherever in it: full names, those of `from package import module` too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & OURS
            found |= inside or {node.module}
    return found


def skipped_without(name: str) -> set[str]:
    """The modules that a file asks for with pytest.importorskip."""
    calls = [node for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.Call)]
    asked = [call.args[0] for call in calls if getattr(call.func, "attr", "") == "importorskip"]
    return {argument.value for argument in asked}


def rank(name: str) -> int | None:
    """The line of ORDER of a module's folder; None for a command."""
    folder, *inside = name.removeprefix("flaxkd.").split(".")
    found = [i for i, line in enumerate(ORDER) if folder in line]
    assert found or not (inside or FILES[name].name == "__init__.py"), f"{folder} has no place in ORDER: give it one"
    return found[0] if found and inside != ["__main__"] else None


def test_every_import_points_up():
    against = []
    for name in OURS - {"flaxkd", *(n for n in OURS if n.startswith("configs"))}:
        line = rank(name)
        for other in imports(name) & OURS - {"flaxkd"}:
            above = len(ORDER) if other.startswith("configs") or rank(other) is None else rank(other)
            same = name.split(".")[:2] == other.split(".")[:2]
            if not same and above >= (len(ORDER) if line is None else line):
                against.append(f"{name} imports {other}")
    assert not against


def test_no_import_goes_in_a_circle():
    tuple(graphlib.TopologicalSorter({name: imports(name) & OURS - {name} for name in OURS}).static_order())


def test_nothing_imports_the_trainer():
    assert not [name for name in OURS if "flaxkd.train" in imports(name)]


@pytest.mark.parametrize("foreign", ["torch", "diffusers", "tensorflow", "tests", "torchmetrics", "torch_fidelity"])
def test_only_tests_import(foreign):
    users = {name for name in OURS if any(other.split(".")[0] == foreign for other in imports(name))}
    allowed = {
        "torch": {SCORES, SUBJECT, RIVAL, ONNX},
        "torchmetrics": {SCORES},
        "torch_fidelity": {SCORES},
        "diffusers": {RIVAL, ONNX},
    }
    assert users <= allowed.get(foreign, set())


def test_only_tests_of_parity_import_torch():
    """So that all others run where there is none."""
    foreign = ("torch", "diffusers", "torchmetrics", "torch_fidelity", "tests.parity")
    users = {
        name
        for name in {*FILES} - OURS
        for other in imports(name) | skipped_without(name)
        if any(other == package or other.startswith(f"{package}.") for package in foreign)
    }
    assert {"tests.parity.conftest", "tests.parity.test_models"} <= users
    assert not {name for name in users if not name.startswith("tests.parity.")}


@pytest.mark.parametrize("module", [SCORES, SUBJECT, RIVAL, ONNX])
def test_torch_is_needed_only_when_it_is_asked_for(module):
    body = ast.parse(FILES[module].read_text()).body
    outside = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in outside for alias in node.names} | {getattr(node, "module", "") for node in outside}
    assert outside and not [name for name in names if name.split(".")[0] in ("torch", "diffusers")]
    assert "torch" in imports(module)


def test_the_parser_of_these_tests_sees_imports():
    """Or all of the above would pass on nothing."""
    assert {"flaxkd.students", "flaxkd.training.task", "flaxkd.tasks.losses", "jax"} <= imports("flaxkd.tasks.distill")
    assert "flaxkd.data.sources" in imports("flaxkd.train")
    assert "transformers" in imports("flaxkd.pretrained.folder")  # within a function


def test_nobody_else_parses_a_configuration_of_a_pipeline():
    """`Folder` reads them, and writing.py writes them."""
    names = ("config.json", "scheduler_config.json", "model_index.json")
    reads = {
        name
        for name in OURS - {"flaxkd.pretrained.folder", "flaxkd.pretrained.hub", "flaxkd.pretrained.writing"}
        for node in ast.walk(ast.parse(FILES[name].read_text()))
        if isinstance(node, ast.Call)
        if getattr(node.func, "attr", getattr(node.func, "id", "")) in ("read_json", "_read_json", "loads", "read_text")
        if any(isinstance(x, ast.Constant) and x.value in names for x in ast.walk(node))
    }
    assert reads == {"flaxkd.export.card", "flaxkd.report"}  # config.json of a run, which has the same name
