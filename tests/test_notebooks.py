"""The notebook runs from its first cell to its last, on a UNet of two blocks and a few pictures."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests import running
from tests.running import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

QUICKSTART = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def shown(cell) -> list[str]:
    """The kinds of pictures that a cell shows."""
    return [kind for output in cell.outputs for kind in output.get("data", ()) if kind.startswith("image/")]


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_the_quickstart_trains_exports_and_draws(place, tmp_path, monkeypatch):
    """With the settings of its own that a reader would change, and nothing else changed. There is little to compile."""
    book = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells), "outputs grow old: clear them"
    (settings,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    keys = place.plain | {"sample.every": 1000}
    config, workdir, *options = running.flags(place.home, tmp_path / "unused", **running.LONG | keys)
    assert config.startswith("--config=") and workdir.startswith("--workdir=")
    options = [option for option in options if not option.startswith("--config.steps=")]
    settings.source = f"STEPS = 4\nOPTIONS = {' '.join(map(repr, options))!r}"

    monkeypatch.setenv("FLAXKD_CACHE", str(place.home / "cache"))
    monkeypatch.setenv("XLA_FLAGS", running.one_device())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    nbclient.NotebookClient(book, timeout=240, resources={"metadata": {"path": tmp_path}}).execute()

    said = {cell.source.partition("\n")[0]: cell for cell in book.cells if cell.cell_type == "code"}
    (training,) = (cell for line, cell in said.items() if line.startswith("!python -m flaxkd.train"))
    assert "next: " in printed(training) and "Traceback" not in printed(training)
    pictures = [shown(cell) for cell in said.values() if shown(cell)]
    diffusers = all(importlib.util.find_spec(name) for name in ("diffusers", "torch"))
    assert pictures == [["image/png"]] * (4 if diffusers else 3)
    assert (tmp_path / "small" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
