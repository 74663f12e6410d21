"""Four fake CPU devices, no network, a compilation cache that outlives the session, a tiny pipeline folder.

The environment is set before anything imports jax, which reads it once.
"""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("FLAXKD_TEST_PLATFORMS", "cpu")  # "cuda,cpu": for device/ alone
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("FLAXKD_TEST_DEVICES", "4")  # 8: all meshes of tasks/test_distill.py, in minutes
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = " ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            f"--xla_force_host_platform_device_count={os.environ['FLAXKD_TEST_DEVICES']}",
            # In jax 0.10, the older emitter of fusions compiles in three quarters of the time. 0.12 ignores this.
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        )
    )
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is what tests cost
os.environ.setdefault("NPROC", "8")  # XLA's threads: collectives of 4 devices can starve each other on 2
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's: they wait busily, and pytest has three processes
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "flaxkd" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest

from tests import tiny
from tests.place import Place
from tests.running import ROOT

gc.set_threshold(100_000, 20, 20)  # tracing makes millions of objects that live, and collections look at them all

# Begun with, since one of them would run alone at the end.
LONG = (
    "tests/test_train.py",
    "tests/tasks/test_distill.py",
    "tests/parity/test_models.py",
    "tests/students/test_students.py",
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


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Where flaxkd.train runs in processes of its own, since a kill needs one."""
    made = Place(tmp_path_factory.mktemp("place"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def home(place) -> Path:
    """A folder with `pictures`, coloured squares with captions, and a cache of its own."""
    return place.home


@pytest.fixture(scope="session")
def plain(place) -> dict:
    """Keys of a run that trains a UNet of two blocks on its own: all of the loop, little to compile."""
    return place.plain


@pytest.fixture
def one_device(monkeypatch):
    """Trainings in this process are for one device: compiling takes half as long."""
    import jax

    from flaxkd.machine import sharding

    one = sharding.make_mesh(1, 1, jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda data, fsdp: one)
