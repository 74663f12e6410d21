"""Four fake CPU devices, no network, a compilation cache that outlives the session, a tiny pipeline folder.

The environment is set before anything imports jax, which reads it once.
"""

import json
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

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.running import EVERY, ROOT, STEPS

# Begun with, since one of them would run alone at the end.
LONG = ("tests/tasks/test_distill.py", "tests/test_train.py", "tests/machine/test_hosts.py", "tests/test_soak.py")


def pytest_collection_modifyitems(items):
    order = {ROOT / file: at for at, file in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A pipeline folder with random weights, 8x8 latents, 32x32 pixels. Read only."""
    return tiny.write(tmp_path_factory.mktemp("tiny") / "pipeline")


# -- Runs: flaxkd.train in a process of its own, since a kill needs one ----------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of coloured squares with captions, and a cache of its own."""
    folder = tmp_path_factory.mktemp("home")
    pictures = folder / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    with (pictures / "metadata.jsonl").open("w") as file:
        for i in range(160):
            Image.fromarray(np.full((32, 32, 3), rng.integers(256, size=3), np.uint8)).save(pictures / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": f"apple number {i}"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def command(home, tiny_pipeline):
    """(workdir, *flags, **keys) -> a started process of flaxkd.train, which distils unless the keys say otherwise."""

    def start(workdir, *flags, **keys):
        keys = {
            "teacher": tiny_pipeline,
            "data.source": home / "pictures",
            "data.resolution": 32,
            "batch_size": 4,
            "steps": STEPS,
            "learning_rate.decay_steps": STEPS,
            "ema_decay": 0.99,
            "log_every": 1,
            "validation.every": EVERY,
            "validation.examples": 4,
            "checkpoint.every": EVERY,
            "sample.every": 1000,
            "sample.steps": 2,
            "sample.prompts": "('red apple','green apple')",
            "compilation_cache": "",  # that of the environment
        } | keys
        arguments = [*flags, *(f"--config.{name}={value}" for name, value in keys.items())]
        environment = os.environ | {"FLAXKD_CACHE": str(home / "cache"), "XLA_FLAGS": ""}
        return subprocess.Popen(
            [sys.executable, "-m", "flaxkd.train", "--config=configs/tiny.py", f"--workdir={workdir}", *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def plain(home) -> dict:
    """Keys of a run that trains a UNet of two blocks on its own: all of the loop, little to compile."""
    unet = dict(
        sample_size=8,
        block_out_channels=[8, 8],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownBlock2D"] * 2,
        mid_block_type=None,
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    from flaxkd.pretrained import fresh

    vae = tiny.VAE | dict(block_out_channels=[4, 4, 4], norm_num_groups=2)
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    text |= dict(max_position_embeddings=16, projection_dim=8)
    architecture = dict(
        unet=unet,
        vae=vae,
        text_encoder=text,
        scheduler=tiny.SCHEDULER | {"_class_name": "PNDMScheduler"},
        vocab_size=520,
    )
    folder = fresh.write(home / "plain", architecture, ["red apple", "green apple"], seed=0)
    return {"teacher": folder.path, "student": ""}
