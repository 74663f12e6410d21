"""Files are whole or absent, and a folder belongs to the settings that it was begun with."""

import errno
import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from flaxkd.data import loader, records
from flaxkd.machine import files

WORDS = {"differ": "holds something else", "remedy": "Choose another."}


def test_a_file_is_whole_or_absent(tmp_path):
    file = tmp_path / "new" / "figures.json"
    with pytest.raises(RuntimeError, match="killed"), files.whole(file) as path:
        path.write_text("half")
        raise RuntimeError("killed")
    assert list(file.parent.iterdir()) == []
    files.write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), files.whole(file) as path:
        path.write_text("half")
        raise RuntimeError
    assert files.read_json(file) == {"a": 1} and list(file.parent.iterdir()) == [file]


def test_a_full_disk_is_reported_as_such(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(files.DiskFull, match=rf"no space is left in {tmp_path} to write a\. .*make room"):
        with files.whole(tmp_path / "a"):
            raise full
    with pytest.raises(PermissionError), files.whole(tmp_path / "a"):
        raise PermissionError("not yours")


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    out = tmp_path / "out"
    with files.whole_folder(out) as new:
        (new / "a").write_text("first")
    with pytest.raises(KeyboardInterrupt), files.whole_folder(out) as new:
        (new / "b").write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in out.iterdir()] == ["a"]
    with files.whole_folder(out) as new:
        (new / "b").write_text("second")
    assert [path.name for path in out.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [out]


def test_a_claim_compares_all_but_the_free_keys(tmp_path):
    file = tmp_path / "run" / "config.json"
    claim = lambda free=(), **settings: files.claim(file, settings, free=free, **WORDS)
    claim(steps=2, parts=("unet",), keep=1)
    claim(steps=2, parts=("unet",), keep=1)
    claim(steps=2, parts=("unet",), keep=3, free=("keep",))
    assert json.loads(file.read_text()) == {"steps": 2, "parts": ["unet"], "keep": 3}
    claim(steps=2, parts=("unet",), keep=3, of_a_later_version=0)
    with pytest.raises(ValueError, match=r"run holds something else:\n  more: None there, 1 here\n  steps: 2 there, 5"):
        claim(steps=5, parts=("unet",), keep=3, more=1)
    with pytest.raises(ValueError, match=r"keep: 3 there, 4 here\nChoose another\.$"):
        claim(steps=2, parts=("unet",), keep=4)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert files.read_jsonl(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert files.read_jsonl(file) == [{"step": 1}, {"step": 2}]


def test_a_damaged_json_file_is_named(tmp_path):
    (tmp_path / "export.json").write_text("{")
    with pytest.raises(ValueError, match=r"export\.json is not JSON .*copied whole"):
        files.read_json(tmp_path / "export.json")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.json"):
        files.read_json(tmp_path / "gone.json")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_follow_the_umask_whoever_writes_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with files.whole(tmp_path / "a.safetensors") as path:
            save_file({"x": np.zeros(3)}, path)
        with files.whole_folder(tmp_path / "out") as new:
            (new / "unet").mkdir()
            save_file({"x": np.zeros(3)}, new / "unet" / "b.safetensors")
    finally:
        os.umask(before)
    for file in (tmp_path / "a.safetensors", tmp_path / "out" / "unet" / "b.safetensors"):
        assert file.stat().st_mode & 0o777 == mode


ODD = ["br[ab]x", "[0:3]", "back\\slash", "st*r", "wh?t", "per%cent", "{0}", "#", "a b", "new\nline", "\udcff", "ü"]


@pytest.mark.parametrize("name", ODD)
def test_any_path_holds_records_and_folders(tmp_path, name):
    """Checkpoints in such paths: tests/training/test_checkpoint.py."""
    folder = tmp_path / name
    with records.writer(folder / "moments-00000-of-00001.array_record") as write:
        write(b"abc")
    about = {"shards": 1, "size": 1}
    assert loader.open_records(folder, about, "moments")[0] == b"abc"
    for text in ("first", "second"):
        with files.whole_folder(folder / "out") as new:
            (new / "a").write_text(text)
    files.write_json(folder / "a.json", [1])
    assert files.read_json(folder / "a.json") == [1]
    files.write_text(folder / "a.json", f"a report on {folder}")
    assert {path.name for path in folder.iterdir()} == {"out", "a.json", "moments-00000-of-00001.array_record"}


def test_a_file_system_that_cannot_rename_over_a_file(tmp_path, monkeypatch):
    rename = os.replace

    def only_to_new(source, target, **_):
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", only_to_new)
    for content in ([1], [2]):
        files.write_json(tmp_path / "a.json", content)
    assert files.read_json(tmp_path / "a.json") == [2] and len(list(tmp_path.iterdir())) == 1
