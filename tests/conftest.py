"""Four fake CPU devices, no network, a compilation cache that outlives the session, a tiny pipeline folder.

The environment is set before anything imports jax, which reads it once.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("FLAXKD_TEST_DEVICES", "4")  # 8: all meshes of tasks/test_distill.py, in minutes
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={os.environ['FLAXKD_TEST_DEVICES']}"
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is what tests cost
os.environ.setdefault("NPROC", "16")  # XLA's threads: collectives of 4 devices can starve each other on 2
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "flaxkd" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest

from tests import tiny
from tests.running import ROOT, flags, write_pictures, write_plain

gc.set_threshold(100_000, 20, 20)  # tracing makes millions of objects that live, and collections look at them all

# Begun with, since one of them would run alone at the end.
LONG = (
    "tests/tasks/test_distill.py",
    "tests/test_train.py",
    "tests/machine/test_hosts.py",
    "tests/faults/test_faults.py",
    "tests/fuzz/test_fuzz.py",
)


def pytest_collection_modifyitems(items):
    order = {ROOT / file: at for at, file in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A pipeline folder with random weights, 8x8 latents, 32x32 pixels. Read only."""
    return tiny.write(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def tiny_xl(tmp_path_factory) -> Path:
    """The same of Stable Diffusion XL, with depths of 1 and 2. Read only."""
    return tiny.write(tmp_path_factory.mktemp("tiny") / "xl", tiny.XL)


# -- Runs: flaxkd.train in a process of its own, since a kill needs one ----------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of coloured squares with captions, and a cache of its own."""
    folder = tmp_path_factory.mktemp("home")
    write_pictures(folder / "pictures")
    return folder


@pytest.fixture(scope="module")
def command(home, tiny_pipeline):
    """(workdir, *flags, **keys) -> a started process of flaxkd.train, which distils unless the keys say otherwise."""

    def start(workdir, *more, **keys):
        arguments = [*flags(home, workdir, **{"teacher": tiny_pipeline} | keys), *more]
        environment = os.environ | {"FLAXKD_CACHE": str(home / "cache"), "XLA_FLAGS": ""}
        return subprocess.Popen(
            [sys.executable, "-m", "flaxkd.train", *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def plain(home) -> dict:
    """Keys of a run that trains a UNet of two blocks on its own: all of the loop, little to compile."""
    return write_plain(home)
