"""Whatever watches a run may fail; the run goes on."""

import errno
import json
import os
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from flaxkd.machine import files
from flaxkd.training import metrics
from tests.running import records

VALUES = {"loss": 0.5, "worse": float("nan")}


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(metrics, "_warned", set())


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_figures_are_written_and_a_new_start_measures_its_first_step_again(tmp_path):
    for start in (0, 0, 1):
        writer = metrics.Writer(tmp_path, start, 9)
        for step in range(start, start + 3):
            writer.write(step, VALUES)
        writer.close()
    assert [r["step"] for r in records(tmp_path)] == [0, 1, 1, 2, 3]
    assert records(tmp_path)[0] == {"step": 0, "loss": 0.5}
    assert len(list((tmp_path / "tensorboard").iterdir())) >= 1


def events(file):
    """The events of a file of TensorBoard: each is its length, a checksum, the event and another checksum."""
    data = file.read_bytes()
    while data:
        length = struct.unpack("<Q", data[:8])[0]
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_gets_them_and_forgets_what_a_run_does_again(tmp_path):
    for start in (0, 2):
        writer = metrics.Writer(tmp_path / str(start), start, 9)
        writer.write(start + 1, VALUES)
        writer.close()
        version, begun, scalar = events(next((tmp_path / str(start) / "tensorboard").iterdir()))
        assert version.file_version == "brain.Event:2"
        assert (begun.step, begun.session_log.status) == (start + 1, SessionLog.START)
        assert (scalar.step, scalar.summary.value[0].tag) == (start + 1, "loss")
        assert scalar.summary.value[0].simple_value == 0.5


@pytest.mark.parametrize("row", metrics.ALWAYS)
def test_one_that_fails_is_one_warning(tmp_path, monkeypatch, capsys, row):
    writer = metrics.Writer(tmp_path, 0, 99)
    monkeypatch.setattr(metrics.WATCHERS[row], "write", full)
    for step in range(50):
        writer.write(step, VALUES)
    writer.close()
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and f"{row} cannot be written (no space left on device)" in said
    assert len(records(tmp_path)) == (0 if row == metrics.FILE else 50)


def test_a_folder_that_takes_no_files_is_a_warning_each(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tensorboard").write_text("a file")
    (tmp_path / "starts.jsonl").mkdir()
    writer = metrics.Writer(tmp_path, 0, 9)
    writer.write(1, VALUES)
    writer.close()
    metrics.note_start(tmp_path, command="a")
    assert capsys.readouterr().err.count("the training goes on") == 3


def test_lines_that_a_full_disk_refuses_follow_later(tmp_path, monkeypatch):
    lines = metrics.Lines(tmp_path, 0, {})
    lines.write(1, {"loss": 1.0})
    whole = os.SEEK_END
    monkeypatch.setattr(os, "SEEK_END", -1)  # any error between opening and writing
    for step in (2, 3):
        with pytest.raises((OSError, ValueError)):
            lines.write(step, {"loss": 1.0})
    monkeypatch.setattr(os, "SEEK_END", whole)
    lines.write(4, {"loss": 1.0})
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4]


def test_weights_and_biases_gets_the_same_if_asked(tmp_path, monkeypatch):
    said = []
    run = types.SimpleNamespace(log=lambda values, step: said.append((step, values)), finish=lambda: said.append("end"))
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **options: said.append(options) or run
    stand_in.util = types.SimpleNamespace(generate_id=lambda: "abc")
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for _ in range(2):
        writer = metrics.Writer(tmp_path / "my-run", 0, 9, ("wandb",), {"steps": 9})
        writer.write(1, VALUES)
        writer.close()
    options, figures, end = said[:3]
    assert options["id"] == said[3]["id"] == "abc" and options["name"] == "my-run" and options["config"] == {"steps": 9}
    assert figures == (1, {"loss": 0.5}) and end == "end"
    assert json.loads((tmp_path / "my-run" / "wandb.json").read_text()) == {"id": "abc"}


def test_without_the_package_a_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    writer = metrics.Writer(tmp_path, 0, 9, ("wandb",))
    writer.write(1, VALUES)
    writer.close()
    assert capsys.readouterr().err.count("warning: wandb cannot be written") == 1 and len(records(tmp_path)) == 1


def test_watching_lets_ctrl_c_pass(tmp_path):
    with pytest.raises(KeyboardInterrupt), metrics.watching("a picture"):
        raise KeyboardInterrupt
    with metrics.watching("a picture"):
        raise files.DiskFull("no space is left")
