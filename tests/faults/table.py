"""The table of faults: what happens to a command, and what must then be true."""

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flaxkd.machine import owners
from tests import running
from tests.place import EVERY, STEPS, Place, one_line

SAME = "resumes, bit for bit the undisturbed run"
GOES_ON = "one warning; the training ends right"
LINE = "one line that says what to do"


class Fault(NamedTuple):
    """expected: in words. run: makes it happen, and checks; returns what happened. quick: one of the suite."""

    expected: str
    run: Callable[[Place], str | None]
    quick: bool = False


FAULTS: dict[str, Fault] = {}


def fault(name: str, expected: str, *given, quick: bool = False):
    """Adds a row: a function of the place, and of what is `given`."""

    def add(function):
        assert name not in FAULTS
        FAULTS[name] = Fault(expected, lambda place: function(place, *given), quick)
        return function

    return add


# -- Kills and signals -----------------------------------------------------------------------------------------------

# {moment: when it has come, from the workdir}
MOMENTS = {
    "while it starts": lambda w: w.parent.exists() and (time.sleep(0.5) or True),
    "after its claim": lambda w: (w / "config.json").exists(),
    "while it compiles": lambda w: (w / "metrics.jsonl").exists(),
    "in its first steps": lambda w: lines(w) > 2,
    "while it saves": lambda w: any(p.name.startswith(f"{EVERY}.") for p in listed(w / "checkpoints")),
    "after a save": lambda w: (w / "checkpoints" / str(EVERY)).exists(),
    "at its last save": lambda w: any(p.name.startswith(str(STEPS)) for p in listed(w / "checkpoints")),
    "while it exports": lambda w: any(p.name.startswith(".diffusers") for p in listed(w)),
    "after its export": lambda w: (w / "diffusers").exists(),
}


def listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def lines(workdir: Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def killed(place: Place, moment: str, student: bool) -> None:
    keys = place.student() if student else {}
    place.undisturbed(**keys)  # all is compiled then
    workdir = place.folder()
    job = place.train(workdir, **keys)
    job.until(lambda: MOMENTS[moment](workdir), moment)
    job.send(signal.SIGKILL)
    job.end(None)
    place.resume(workdir, **keys)


for moment in MOMENTS:
    fault(f"killed {moment}", SAME, moment, False, quick=moment == "after a save")(killed)


def signalled(place: Place, number: signal.Signals) -> None:
    workdir = place.folder()
    job = place.train(workdir)
    job.until(lambda: lines(workdir) > 3, "steps")
    job.send(number)
    said = job.end(143)
    assert f"{number.name}: saving, then stopping" in said and "the same command resumes" in said, said
    place.resume(workdir)


for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    fault(f"{number.name} between steps", SAME, number, quick=number == signal.SIGTERM)(signalled)


@fault("SIGHUP under nohup", "ignored; the run ends right")
def nohup(place: Place) -> None:
    workdir = place.folder()
    job = place.train(workdir, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    job.until(lambda: lines(workdir) > 2, "steps")
    job.send(signal.SIGHUP)
    job.end()
    place.check_same(workdir)


@fault("SIGTERM while TensorBoard cannot be written", SAME)
def deaf(place: Place) -> None:
    workdir = place.folder()
    job = place.train(workdir, before=refused("events.out", "EDQUOT"))
    job.until(lambda: lines(workdir) > 3, "steps")
    job.send(signal.SIGTERM)
    assert job.end(143).count("tensorboard cannot be written") == 1
    place.resume(workdir)


@fault("stopped and continued (SIGSTOP)", "the run ends right")
def paused(place: Place) -> None:
    workdir = place.folder()
    job = place.train(workdir)
    job.until(lambda: lines(workdir) > 3, "steps")
    job.send(signal.SIGSTOP)
    time.sleep(1)
    job.send(signal.SIGCONT)
    job.end()
    place.check_same(workdir)


# -- What only watches -----------------------------------------------------------------------------------------------


def refused(part: str, error: str, after: int = 0) -> str:
    """Python that lets no file be written any more whose path has this part: the system reports `error`."""
    return f"""
import builtins, errno, io, os
number = errno.{error}
class Refusing(io.FileIO):
    def write(self, data):
        raise OSError(number, os.strerror(number))
def opened(open):
    def open_or_refuse(file, mode="r", *args, **kwargs):
        if {part!r} in str(file) and any(letter in mode for letter in "wax+"):
            raw = Refusing(file, mode.replace("b", "").replace("t", ""))
            return io.BufferedWriter(raw, 1) if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw, 1))
        return open(file, mode, *args, **kwargs)
    return open_or_refuse
builtins.open = io.open = opened(io.open)
"""


def watched(place: Place, part: str, error: str, what: str) -> None:
    workdir = place.folder()
    said = place.train(workdir, before=refused(part, error), pictures=True).end()
    assert said.count("warning:") == 1 and f"warning: {what} cannot be written" in said, said
    ours, theirs = (running.state(folder, STEPS) for folder in (workdir, place.undisturbed()))
    running.assert_same_bits(ours, theirs)


for part, error, what in [
    ("events.out", "ENOSPC", "tensorboard"),
    ("events.out", "EIO", "tensorboard"),
    ("metrics.jsonl", "EDQUOT", "metrics.jsonl"),
    ("starts.jsonl", "EROFS", "starts.jsonl"),
    ("samples", "ENOSPC", "the sheet of samples"),
    ("curves.png", "ENOSPC", "curves.png"),
]:
    fault(f"{what} cannot be written ({error})", GOES_ON, part, error, what)(watched)


@fault("folders where files of figures belong", GOES_ON)
def folders_for_files(place: Place) -> None:
    workdir = place.folder()
    for name in ("metrics.jsonl", "samples.png", "curves.png", "starts.jsonl"):
        (workdir / name / "full").mkdir(parents=True)
    (workdir / "tensorboard").write_text("a file")
    said = place.train(workdir, pictures=True).end()
    assert "Traceback" not in said and said.count("the training goes on") == 4, said
    running.assert_same_bits(running.state(workdir, STEPS), running.state(place.undisturbed(), STEPS))


@fault("--wandb without wandb", GOES_ON)
def no_wandb(place: Place) -> None:
    workdir = place.folder()
    said = place.train(workdir, "--wandb", before="import sys; sys.modules['wandb'] = None").end()
    assert said.count("warning: wandb cannot be written") == 1, said
    place.check_same(workdir)


# -- Streams ---------------------------------------------------------------------------------------------------------


def unread(place: Place, before: str) -> None:
    workdir = place.folder()
    place.train(workdir, before=f"import os; {before}").end()
    place.check_same(workdir)


for name, before in {
    "its reader gone": "r, w = os.pipe(); os.close(r); os.dup2(w, 1); os.dup2(w, 2)",
    "on a full disk": "w = os.open('/dev/full', os.O_WRONLY); os.dup2(w, 1); os.dup2(w, 2)",
    "closed": "os.close(1); os.close(2)",
}.items():
    fault(f"output {name}", "the run ends right", before)(unread)


def fill(ballast: Path) -> None:
    """Fills a disk with one file."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**14))


# -- Disks -----------------------------------------------------------------------------------------------------------


@fault("disk full at the first save", f"{LINE}, within seconds; {SAME}")
def full_save(place: Place) -> None:
    workdir = place.folder()
    with place.disk(workdir, "64m"):
        job = place.train(workdir)
        job.until(lambda: lines(workdir) > 0, "steps")
        fill(workdir / "ballast")
        said = job.end(1, within=60)
        one_line(said, "a checkpoint cannot be written to", "free", "Make room", "no space left on device")
        assert len(said.splitlines()) < 60, said
        (workdir / "ballast").unlink()
        place.resume(workdir)


@fault("disk read-only in mid-run", f"{LINE}, within seconds; {SAME}")
def read_only(place: Place) -> None:
    workdir = place.folder()
    with place.disk(workdir / "checkpoints", "64m") as again:
        job = place.train(workdir)
        job.until(lambda: (workdir / "checkpoints" / str(EVERY)).exists(), "a save")
        for _ in range(1000):
            try:
                again("ro")
                break
            except AssertionError:  # a file is being written
                time.sleep(0.01)
        said = job.end(1, within=60)
        one_line(said, "a checkpoint cannot be written to", "Read-only file system")
        again("rw")
        place.resume(workdir)


@fault("disk full before the start", f"{LINE}; {SAME}")
def full_start(place: Place) -> None:
    workdir = place.folder()
    with place.disk(workdir, "1m") as again:
        (workdir / "ballast").write_bytes(bytes(2**20 - 2**13))
        said = place.train(workdir).end(1, within=60)
        one_line(said, "free", str(workdir))
        (workdir / "ballast").unlink()
        again("size=64m")
        place.resume(workdir)


@fault("a quota on the size of files", f"{LINE}; {SAME}")
def limited(place: Place) -> None:
    place.undisturbed()  # the latents are there then
    workdir = place.folder()
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    said = place.train(workdir, before=limit).end(1, within=60)
    one_line(said, "a checkpoint cannot be written", "file too large")
    place.resume(workdir)


@fault("disk full inside an export", f"{LINE}; nothing half-written")
def full_export(place: Place) -> None:
    out = place.folder("exports")
    with place.disk(out, "48k") as again:
        arguments = ["--workdir", place.undisturbed(), "--out", out / "sd"]
        one_line(place.start("convert.to_diffusers", *arguments).end(1), "no space is left", "free", "make room")
        assert not listed(out)
        again("size=16m")
        place.start("convert.to_diffusers", *arguments).end()
        assert [path.name for path in listed(out)] == ["sd"]


@fault("disk full inside the export of a run", f"{LINE}; {SAME}")
def full_last_export(place: Place) -> None:
    workdir = place.folder()
    said = place.train(workdir, before=refused("model_index.json", "ENOSPC")).end(1)
    one_line(said, "no space is left", "free", "make room")
    place.resume(workdir)


@fault("an export of a run killed, and its leftover", SAME)
def leftover(place: Place) -> None:
    workdir = place.folder()
    job = place.train(workdir)
    job.until(lambda: MOMENTS["while it exports"](workdir), "an export")
    job.send(signal.SIGKILL)
    job.end(None)
    place.resume(workdir)
    assert not [path for path in listed(workdir) if path.name.startswith(".")]


@fault("no rename over a file, no hard links", "the run ends right")
def poor_files(place: Place) -> None:
    before = """
import os
rename, replace = os.rename, os.replace
def only_to_new(how):
    def call(source, target, **kwargs):
        if os.path.isfile(target):
            raise FileExistsError(17, "File exists", str(target))
        return how(source, target, **kwargs)
    return call
def link(*_, **__):
    raise PermissionError(1, "Operation not permitted")
os.rename, os.replace, os.link = only_to_new(rename), only_to_new(replace), link
"""
    workdir = place.folder()
    place.train(workdir, before=before).end()
    place.check_same(workdir)


@fault("no locks on the file system", "the run ends right")
def no_locks(place: Place) -> None:
    before = "import fcntl\ndef flock(*_): raise OSError(95, 'Operation not supported')\nfcntl.flock = flock"
    workdir = place.folder()
    place.train(workdir, before=before).end()
    place.check_same(workdir)


# -- Two at once -----------------------------------------------------------------------------------------------------


@fault("a second training in one workdir", "the second is refused by name of the first", quick=True)
def second(place: Place) -> None:
    two(place, to_the_end=False)


@fault("two trainings in one workdir", "the second is refused by name of the first, which ends right")
def two(place: Place, to_the_end: bool = True) -> None:
    workdir = place.folder()
    first = place.train(workdir)
    first.until(lambda: (workdir / "config.json").exists(), "its claim")
    said = place.train(workdir).end(1)
    one_line(said, "in use by a training", f"process {first.pid} on host {socket.gethostname()} since")
    if to_the_end:
        first.end()
        place.check_same(workdir)
    else:
        first.send(signal.SIGKILL)
        first.end(None)


def stale(place: Place, owner: owners.Owner) -> None:
    workdir = place.folder()
    workdir.mkdir()
    lock = {"work": "a training", "host": "node7", "since": "yesterday", "owner": owner}
    (workdir / owners.LOCK).write_text(json.dumps(lock))
    place.train(workdir).end()
    place.check_same(workdir)


for name, owner in {
    "a dead process": owners.Owner(owners.machine(), 2**22 + 1, 1),
    "a process number used again": owners.Owner(owners.machine(), os.getpid(), 1),
    "a host that is gone": owners.Owner("0" * 8, 1, 1),
}.items():
    fault(f"the lock of {name}", "taken over", owner)(stale)


def cache(place: Place, out: Path, **kwargs):
    arguments = ["--source", place.home / "pictures", "--teacher", place.plain["teacher"], "--out", out]
    return place.start("flaxkd.cache", *arguments, "--batch-size", "4", "--validation", "0.2", **kwargs)


def shards(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


SLOW = "import time\nfrom flaxkd.data import large\nfill = large._fill\n"
SLOW += "def slow(*a):\n    time.sleep(1)\n    return fill(*a)\nlarge._fill = slow"


@fault("two flaxkd.cache with one --out", "the second is refused by name of the first, which ends right")
def two_caches(place: Place) -> None:
    out = place.folder("cache")
    first = cache(place, out, before=SLOW)
    first.until(lambda: (out / "plan.json").exists(), "its plan")
    one_line(cache(place, out).end(1), "in use by flaxkd.cache", f"process {first.pid} on host")
    first.end()
    assert not (out / owners.LOCK).exists()


def cache_ended(place: Place, number: signal.Signals) -> None:
    straight, out = place.folder("cache"), place.folder("cache")
    cache(place, straight).end()
    job = cache(place, out, before=SLOW)
    job.until(lambda: (out / "plan.json").exists(), "its plan")
    time.sleep(1.1)
    job.send(number)
    job.end(None)
    cache(place, out).end()
    assert shards(out) == shards(straight)


for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    fault(f"flaxkd.cache ended by {number.name}", "resumes; the same shards", number)(cache_ended)


@fault("disk full in flaxkd.cache", f"{LINE}; resumes; the same shards")
def cache_full(place: Place) -> None:
    straight, out = place.folder("cache"), place.folder("cache")
    cache(place, straight).end()
    with place.disk(out, "128k") as again:
        one_line(cache(place, out).end(1), "no space is left", "make room", "free")
        again("size=16m")
        cache(place, out).end()
        assert shards(out) == shards(straight)


# -- Paths and variables ---------------------------------------------------------------------------------------------

PATHS = {
    "[...]": "br[ab]x",
    "a slice [0:3]": "x[0:3]",
    "a backslash": "back\\slash",
    "a star, beside what it matches": "st*r",
    "a question mark and a percent sign": "wh?t 100%s",
    "braces and a hash": "{0}#{x}",
    "spaces and quotes": " a 'b\" ",
    "a line break": "new\nline",
    "a lone surrogate": "sur\udcffogate",
    "letters of many scripts": "模型 ünï 🍎",
    "200 letters in each of 10 folders": "/".join("x" * 200 for _ in range(10)),
}


def odd_path(place: Place, name: str) -> None:
    workdir = place.folder(name)
    if "*" in name:
        shutil.copytree(place.undisturbed(), place.folder("star").parent / "star")
        shutil.copytree(place.undisturbed(), workdir.parent / "star")
    job = place.train(workdir)
    job.until(lambda: (workdir / "checkpoints" / str(EVERY)).exists(), "a save")
    job.send(signal.SIGKILL)
    job.end(None)
    assert "resuming at step" in place.resume(workdir)
    place.start("flaxkd.report", "--workdir", workdir).end()


for name, path in PATHS.items():
    fault(f"a workdir with {name}", SAME, path)(odd_path)


@fault("LC_ALL=C PYTHONUTF8=0 and letters outside ASCII", "the run ends right")
def ascii_only(place: Place) -> None:
    workdir = place.folder("ünï 模型")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    place.train(workdir, fresh=True, environment=environment, pictures=True).end()
    running.assert_same_bits(running.state(workdir, STEPS), running.state(place.undisturbed(), STEPS))


@fault("a path too long for the system", LINE, quick=True)
def too_long(place: Place) -> None:
    one_line(place.train(place.folder("x" * 300)).end(1), "File name too long")


@fault("a workdir that is a file", LINE, quick=True)
def workdir_is_a_file(place: Place) -> None:
    workdir = place.folder()
    workdir.write_text("a file")
    one_line(place.train(workdir).end(1), str(workdir))


@fault("a workdir on a read-only file system", LINE, quick=True)
def read_only_start(place: Place) -> None:
    one_line(place.train(Path("/proc/run")).end(1), "/proc/run")


def without(place: Place, **environment: str) -> None:
    workdir = place.folder()
    said = place.train(workdir, fresh=True, environment=environment, pictures=True).end()
    assert "Traceback" not in said, said
    running.assert_same_bits(running.state(workdir, STEPS), running.state(place.undisturbed(), STEPS))


fault("HOME not writable", "the run ends right")(lambda place: without(place, HOME="/dev/null", XDG_CACHE_HOME=""))
fault("TMPDIR not writable", "the run ends right")(
    lambda place: without(place, TMPDIR="/dev/null", TEMP="/dev/null", TMP="/dev/null")
)


@fault("the clock goes backwards", "the run ends right; no rate below zero")
def clock(place: Place) -> None:
    before = "import time\nnow = time.time\nbegun = now()\ntime.time = lambda: 2 * begun - now()"
    workdir = place.folder()
    place.train(workdir, before=before).end()
    place.check_same(workdir)
    rates = [record["images_per_second"] for record in running.records(workdir) if "images_per_second" in record]
    assert all(0 < rate < 1e6 for rate in rates), rates


@fault("files of an export and the umask", "all files have the mode of the umask")
def umask(place: Place) -> None:
    workdir = place.folder()
    place.train(workdir, before="import os; os.umask(0o027)").end()
    modes = {path.name: path.stat().st_mode & 0o777 for path in workdir.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


# -- Damage ----------------------------------------------------------------------------------------------------------


def copied(place: Place) -> Path:
    """A run stopped after its second save."""
    workdir = place.folder()
    shutil.copytree(place.undisturbed(), workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    shutil.rmtree(workdir / "diffusers")
    return workdir


def spoil(folder: Path) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file() and "/d/" in str(path)):
        os.truncate(file, file.stat().st_size // 2)


def not_a_number(step: Path, branch: str) -> None:
    """Puts NaN into a branch of a checkpoint."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(step / "state")
        spoilt = lambda x: np.full_like(x, np.nan) if np.issubdtype(np.asarray(x).dtype, np.floating) else np.asarray(x)
        state = {name: jax.tree.map(spoilt if name == branch else np.asarray, tree) for name, tree in state.items()}
        shutil.rmtree(step / "state")
        checkpointer.save(step / "state", state)


@fault("the newest checkpoint cut short", SAME, quick=True)
def cut_short(place: Place) -> None:
    workdir = copied(place)
    spoil(workdir / "checkpoints" / str(2 * EVERY))
    assert f"resuming at step {EVERY} " in place.resume(workdir)


@fault("all checkpoints cut short", LINE)
def all_cut_short(place: Place) -> None:
    workdir = copied(place)
    spoil(workdir / "checkpoints")
    said = place.train(workdir).end(1)
    assert "error: no checkpoint in" in said and "Traceback" not in said, said


def with_nan(place: Place, branch: str) -> None:
    workdir = copied(place)
    not_a_number(workdir / "checkpoints" / str(2 * EVERY), branch)
    said = place.resume(workdir)
    assert f"resuming at step {EVERY} " in said and "NaN" in said, said


for branch in ("params", "ema", "opt_state"):
    fault(f"NaN in a checkpoint's {branch}", SAME, branch)(with_nan)


def damaged_file(place: Place, name: str, content: bytes, *words: str) -> None:
    workdir = copied(place)
    (workdir / name).write_bytes(content)
    if words:
        one_line(place.train(workdir).end(1), *words)
    else:
        place.resume(workdir)


fault("config.json cut short", LINE, "config.json", b'{"steps"', "config.json is not JSON")(damaged_file)
fault("export.json cut short", SAME, "export.json", b"{")(damaged_file)


@fault("a file that a killed process was writing", SAME)
def leftovers(place: Place) -> None:
    workdir = copied(place)
    dead = f".samples.png.{owners.machine()}-{2**22 + 1}-1.01234567"
    (workdir / dead).write_text("half")
    place.resume(workdir)


@fault("a loss that diverges, with a save at every step", "the last good checkpoint is one of a taken step")
def diverged(place: Place) -> None:
    workdir = place.folder()
    keys = {"checkpoint.every": 1, "checkpoint.keep": 1, "bad_steps.in_a_row": 3, "learning_rate.warmup_steps": 0}
    said = place.train(workdir, **keys, **{"learning_rate.peak_value": 1e30}).end(1)
    assert "Traceback" not in said and "the last 3 steps were skipped" in said, said
    saved = [int(path.name) for path in listed(workdir / "checkpoints")]
    assert len(saved) == 1 and f"The last good checkpoint is {workdir / 'checkpoints' / str(saved[0])}" in said, said
    assert running.state(workdir, saved[0])["health"]["in_a_row"] == 0


@fault("started twice before its first save", "step 0 is recorded once")
def twice(place: Place) -> None:
    workdir = place.folder()
    job = place.train(workdir)
    job.until(lambda: lines(workdir) > 0, "step 0")
    job.send(signal.SIGKILL)
    job.end(None)
    place.resume(workdir)
    assert [record["step"] for record in running.records(workdir)].count(0) == 1


# -- Several processes -----------------------------------------------------------------------------------------------


def missing(place: Place, number: int, message: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={number}"]
    before = "from flaxkd.machine import hosts; hosts.ARRIVAL = 2"
    said = place.train(place.folder(), *flags, before=before).end(1, within=60)
    one_line(said, "the processes cannot find each other", message)


for number, message in ((0, "process 1 of 2 did not come"), (1, "process 0 cannot be reached")):
    fault(f"process {1 - number} of 2 never comes", LINE, number, message, quick=True)(missing)

# -- A student: the longest, last ------------------------------------------------------------------------------------

for moment in MOMENTS:
    fault(f"a student killed {moment}", SAME, moment, True)(killed)
