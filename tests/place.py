"""Where commands run: tiny trainings in processes of their own, which may be killed, and disks of a few megabytes."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import running, tiny
from tests.running import ROOT

EVERY, STEPS = 4, 12  # of a run here: three checkpoints
PATIENCE = 240  # seconds; nothing here takes longer, however busy the machine is


STAND_INS = """
from PIL import Image
from flaxkd.machine import files
from flaxkd.tasks.samples import Sheet
from flaxkd.training import curves
Sheet.__init__ = lambda *_: None
Sheet.draw = lambda self, trained, frozen, path: None
def draw(workdir):
    with files.whole(workdir / "curves.png") as path:
        Image.new("RGB", (8, 8)).save(path, "PNG")
curves.draw = draw
"""


class Impossible(Exception):
    """This machine cannot have this fault."""


class Job:
    """A command that runs. out: its output so far."""

    def __init__(self, pid: int, out: Path, process: subprocess.Popen | None = None):
        self.pid, self.file, self.process = pid, out, process

    @property
    def out(self) -> str:
        return self.file.read_text(errors="replace") if self.file.is_file() else ""

    @property
    def status(self) -> int | None:
        if self.process:
            return self.process.poll()
        done = Path(f"{self.file}.status")
        return int(done.read_text()) if done.is_file() else None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Waits for a moment in the life of the job."""
        end = time.monotonic() + PATIENCE
        while not ready():
            assert self.status is None, f"it ended before {what}: {self.status}\n{self.out}"
            assert time.monotonic() < end, f"no {what} in {PATIENCE} s\n{self.out}"
            time.sleep(0.002)

    def end(self, status: int | None = 0, within: float = PATIENCE) -> str:
        """Its output, once it has ended with this status (None: any). `within` that time, or it hangs."""
        end = time.monotonic() + within
        while self.status is None:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise AssertionError(f"it hangs\n{self.out}")
            time.sleep(0.01)
        assert status is None or self.status == status, f"exit status {self.status}, not {status}\n{self.out}"
        return self.out


class Place:
    """One folder for everything."""

    def __init__(self, root: Path):
        self.root, self.count, self.mounts = root, 0, []
        self.zygote: subprocess.Popen | None = None
        self.home = root / "home"
        running.write_pictures(self.home / "pictures")
        self.known: dict[str, Path] = {}

    @functools.cached_property
    def plain(self) -> dict:
        """Keys of a run that trains a UNet of two blocks on its own: all of the loop, little to compile."""
        return running.write_plain(self.home)

    def close(self) -> None:
        if self.zygote:
            self.zygote.kill()
            self.zygote.communicate()
        for mount in reversed(self.mounts):
            subprocess.run(["umount", "-l", mount], check=False)

    def folder(self, name: str = "run") -> Path:
        """A new path, in a folder of its own."""
        self.count += 1
        made = self.root / f"{self.count:03}"
        made.mkdir()
        return made / name

    # -- Commands ------------------------------------------------------------------------------------------------

    def start(self, module: str, *arguments, before: str = "", fresh: bool = False, **environment: str) -> Job:
        """A started command. before: Python to run in it first. fresh: by a new Python, for variables that Python and
        JAX read when they start."""
        self.count += 1
        out = self.root / f"{self.count:03}.out"
        arguments = [os.fspath(x) if isinstance(x, Path) else str(x) for x in arguments]
        usual = {"FLAXKD_CACHE": str(self.home / "cache"), "PYTHONPATH": str(ROOT), "XLA_FLAGS": running.one_device()}
        if fresh:
            code = f"{before}\nimport importlib, sys\nimportlib.import_module({module!r}).main(sys.argv[1:])"
            with out.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | usual | environment,
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                )  # fmt: skip
            return Job(process.pid, out, process)
        if self.zygote is None:
            self.zygote = subprocess.Popen(
                [sys.executable, "-m", "tests.zygote"], cwd=ROOT, env=os.environ | usual,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        job = {"module": module, "arguments": arguments, "environment": usual | environment, "before": before}
        self.zygote.stdin.write(json.dumps(job | {"out": str(out)}) + "\n")
        self.zygote.stdin.flush()
        return Job(int(self.zygote.stdout.readline()), out)

    def train(self, workdir, *flags, before="", fresh=False, environment=None, pictures=False, **keys) -> Job:
        """A started training of `plain`, or of what the keys say. pictures: it draws them, which takes most of its
        time; else they are stand-ins."""
        before += "" if pictures else STAND_INS
        often = {"checkpoint.every": EVERY, "validation.every": EVERY, "sample.every": 1000 * pictures}
        keys = self.plain | {"steps": STEPS} | often | keys
        flags = (*running.flags(self.home, workdir, **keys), *flags)
        return self.start("flaxkd.train", *flags, before=before, fresh=fresh, **environment or {})

    def student(self) -> dict:
        """Keys of a run that distils a student, instead of `plain`."""
        if not (self.home / "pipeline").exists():
            tiny.write(self.home / "pipeline")
        return {"teacher": self.home / "pipeline", "student": "sd_tiny"}

    # -- What must be true afterwards ----------------------------------------------------------------------------

    def undisturbed(self, **keys) -> Path:
        """The workdir of a run that nothing happens to."""
        name = json.dumps({key: str(value) for key, value in keys.items()})
        if name not in self.known:
            workdir = self.folder("undisturbed")
            self.train(workdir, **keys).end()
            self.known[name] = workdir
        return self.known[name]

    def check_same(self, workdir: Path, **keys) -> None:
        """The run in `workdir` ended in the state, figures and files of an undisturbed one, bit for bit."""
        other = self.undisturbed(**keys)
        running.assert_same_bits(running.state(workdir, STEPS), running.state(other, STEPS))
        strip = lambda record: {key: value for key, value in record.items() if key != "images_per_second"}
        assert [*map(strip, running.records(workdir))] == [*map(strip, running.records(other))]
        files = lambda folder: {path.name for path in folder.iterdir()}
        assert files(workdir) == files(other), files(workdir) ^ files(other)
        weights = lambda folder: (folder / "diffusers/unet/diffusion_pytorch_model.safetensors").read_bytes()
        assert weights(workdir) == weights(other)

    def resume(self, workdir: Path, **keys) -> str:
        """The same command again, to the end; everything is as if nothing had happened. Returns what it says."""
        said = self.train(workdir, **keys).end()
        self.check_same(workdir, **keys)
        return said

    # -- Disks ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def disk(self, folder: Path, size: str) -> Iterator[Callable[[str], None]]:
        """A small disk at `folder`. Gives a function that mounts it again with other options, e.g. "size=64m", "ro"."""
        folder.mkdir(parents=True, exist_ok=True)
        mount = lambda *how: subprocess.run(["mount", *how, folder], capture_output=True, text=True, check=False)
        if not shutil.which("mount") or mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs").returncode:
            raise Impossible("no right to mount a disk")
        self.mounts.append(folder)

        def again(options: str) -> None:
            done = mount("-o", f"remount,{options}")
            assert done.returncode == 0, done.stderr

        try:
            yield again
        finally:
            subprocess.run(["umount", "-l", folder], check=False)
            self.mounts.remove(folder)


def one_line(said: str, *words: str) -> str:
    """The error in an output, which has these words and no traceback. It is one message, not one among hundreds."""
    assert "Traceback" not in said and "Error:" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    text = said[said.index("error: ") :]
    for word in words:
        assert word in text, f"{word!r} is missing in: {text}"
    assert len(text.splitlines()) <= 4, text
    return errors[0]
