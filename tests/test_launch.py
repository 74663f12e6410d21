"""What starts a run elsewhere: it parses, and ends in the one command."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flaxkd.machine import hosts
from tests.running import ROOT

LAUNCH = ROOT / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
COMMAND = "python -m flaxkd.train"


@pytest.mark.parametrize("file", [*SHELL, ROOT / ".ci" / "run"], ids=lambda file: file.name)
def test_shellcheck_finds_nothing(file):
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_way_ends_in_the_same_command():
    assert {file.name for file in SHELL} == {"local.sh", "tpu_vm.sh", "slurm.sbatch"}
    for file in (*SHELL, LAUNCH / "README.md"):
        assert COMMAND in file.read_text(), file
    assert '["' + COMMAND.replace(" ", '", "') + '"]' in (LAUNCH / "Dockerfile").read_text()


def test_the_image_has_what_trains_and_serves():
    """The packages, by the line of the Dockerfile itself, and flags of flaxkd.serve that exist."""
    text = (LAUNCH / "Dockerfile").read_text()
    line = re.search(r"RUN (python -c .*?) > packages.txt", text, re.DOTALL)[1]
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    done = run(["sh", "-c", line], env=os.environ | {"EXTRA": "tpu"})
    assert {"jax[tpu]", "flax>=0.12", "starlette", "uvicorn"} <= {*done.stdout.splitlines()}, done.stderr
    served = run([sys.executable, "-m", "flaxkd.serve", "--help"])
    for said in (text, (LAUNCH / "README.md").read_text()):
        flags = re.search(r"flaxkd.serve (--.*)", said)[1]
        assert {*re.findall(r"--[a-z]+", flags)} == {"--host", "--model"} <= {*re.findall(r"--[a-z]+", served.stdout)}


def test_the_pods_get_flags_that_exist():
    claim, jobs = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    [job] = jobs["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    flags = {flag.partition("=")[0].removeprefix("--").partition(".")[0] for flag in container["args"]}
    assert "distributed" in flags and flags <= {*hosts.FLAGS, "config", "workdir"}
    assert "command" not in container  # the image has it
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]


def test_the_readme_names_every_flag_and_file():
    text = (LAUNCH / "README.md").read_text()
    named = set(re.findall(r"--(distributed|coordinator_address|num_processes|process_id)\b", text))
    assert named == {*hosts.FLAGS}
    for file in (*SHELL, LAUNCH / "gke.yaml", LAUNCH / "Dockerfile"):
        assert f"launch/{file.name}" in text, file
