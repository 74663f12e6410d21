"""One process at a time works in a folder; what a dead one holds or leaves is nobody's."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from flaxkd.machine import files, owners
from flaxkd.machine.owners import Owner

DEAD = Owner(owners.machine(), 2**22 + 1, 1)  # no system has such a process
ELSEWHERE = Owner("0" * 8, 1, 1)


def hold(folder, owner: Owner) -> None:
    lock = {"work": "a training", "host": "node7", "since": "yesterday", "owner": owner}
    (folder / owners.LOCK).write_text(json.dumps(lock))


def test_the_second_one_is_refused_by_the_name_of_the_first(tmp_path):
    with owners.alone(tmp_path, "a training"):
        with pytest.raises(owners.Held, match=rf"in use by a training, process {os.getpid()} on host .* since 20\d\d-"):
            with owners.alone(tmp_path, "a training"):
                pass
    assert list(tmp_path.iterdir()) == []
    with owners.alone(tmp_path, "a training"):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"owner": 3}', '{"owner": [1]}'])
def test_a_lock_that_says_nothing_is_nobodys(tmp_path, content):
    (tmp_path / owners.LOCK).write_text(content)
    with owners.alone(tmp_path, "a training"):
        pass


@pytest.mark.parametrize("flock", [True, False])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, monkeypatch, flock):
    if not flock:  # as on some network file systems
        monkeypatch.setattr(owners, "fcntl", None)
    reused = owners.this()._replace(started=1)  # our number, but an earlier process
    for owner in (DEAD, reused):
        hold(tmp_path, owner)
        with owners.alone(tmp_path, "a training"):
            pass
    if not flock:
        hold(tmp_path, owners.this())
        with pytest.raises(owners.Held, match="on host node7 since yesterday"), owners.alone(tmp_path, "a training"):
            pass


def test_a_killed_process_holds_nothing(tmp_path):
    code = "import sys, time; from flaxkd.machine import owners\n"
    code += "with owners.alone(sys.argv[1], 'a training'): print('mine', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"mine\n"
    with pytest.raises(owners.Held, match=f"process {process.pid} "), owners.alone(tmp_path, "a training"):
        pass
    process.kill()
    process.wait()
    with owners.alone(tmp_path, "a training"):
        pass


def test_a_holder_on_another_host_is_told_by_its_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "PULSE", 0.05)
    monkeypatch.setattr(owners, "PATIENCE", 0.5)
    hold(tmp_path, ELSEWHERE)
    over = threading.Event()

    def live():
        while not over.wait(0.05):
            os.utime(tmp_path / owners.LOCK)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(owners.Held, match="process 1 on host node7 since yesterday"):
        with owners.alone(tmp_path, "a training"):
            pass
    over.set()
    thread.join()
    with owners.alone(tmp_path, "a training"):  # it gives such signs itself
        before = (tmp_path / owners.LOCK).stat().st_mtime_ns
        time.sleep(0.2)
        assert (tmp_path / owners.LOCK).stat().st_mtime_ns > before


def test_unfinished_files_of_the_dead_are_removed(tmp_path):
    name = lambda owner: f".a.{'-'.join(map(str, owner))}.01234567"
    kept = [tmp_path / name(owners.this()), tmp_path / name(ELSEWHERE), tmp_path / ".a.b", tmp_path / "a"]
    for path in (*kept, tmp_path / name(DEAD)):
        path.write_text("")
    (tmp_path / f"{name(DEAD)[:-1]}8").mkdir()
    files.clear(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    os.utime(kept[1], (0, 0))
    files.clear(tmp_path)
    assert not kept[1].exists()
    files.clear(tmp_path / "gone")


def test_a_folder_is_given_back_if_its_replacement_was_killed(tmp_path):
    scratch = tmp_path / f".o.{'-'.join(map(str, DEAD))}.01234567"
    (scratch / "old").mkdir(parents=True)
    (scratch / "old" / "a").write_text("first")
    (scratch / "name").write_bytes(b"out")
    files.clear(tmp_path)
    assert (tmp_path / "out" / "a").read_text() == "first" and not scratch.exists()
    long = tmp_path / ("x" * 255)
    files.write_text(long, "a name as long as it can be")
    assert long.is_file()
