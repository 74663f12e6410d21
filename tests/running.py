"""A run of flaxkd.train from outside: how it ended, and what it left in its workdir."""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
from PIL import Image

from flaxkd.machine import files
from tests import tiny

ROOT = Path(__file__).parent.parent  # of the repository
STEPS, EVERY = 40, 10  # of a run that learns, and between its checkpoints; those of place.py are shorter
LONG = {"steps": STEPS, "checkpoint.every": EVERY, "validation.every": EVERY}


def write_pictures(folder: Path) -> Path:
    """A folder of coloured squares with captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w") as file:
        for i in range(160):
            Image.fromarray(np.full((32, 32, 3), rng.integers(256, size=3), np.uint8)).save(folder / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": f"apple number {i}"}) + "\n")
    return folder


def write_plain(home: Path) -> dict:
    """Keys of a run that trains a UNet of two blocks on its own: all of the loop, little to compile."""
    unet = dict(
        sample_size=8,
        block_out_channels=[8],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["CrossAttnDownBlock2D"],
        mid_block_type=None,
        up_block_types=["UpBlock2D"],
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
    return {"teacher": folder.path, "student": "", "sample.every": 0}


def flags(home: Path, workdir: Path, **keys) -> list[str]:
    """Flags of flaxkd.train for a short run on `home`/pictures, with other keys of the configuration."""
    keys = (
        {
            "data.source": home / "pictures",
            "data.resolution": 32,
            "batch_size": 4,
            "learning_rate.decay_steps": STEPS,
            "ema_decay": 0.99,
            "log_every": 1,
            "validation.examples": 4,
            "sample.every": 1000,
            "sample.steps": 2,
            "sample.prompts": "('red apple','green apple')",
            "compilation_cache": "",  # that of the environment
        }
        | LONG
        | keys
    )
    return ["--config=configs/tiny.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in keys.items())]


def one_device() -> str:
    """This process' XLA_FLAGS, for another one that has a single device."""
    return re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])


def wait_for(path: Path, process, timeout=600) -> None:
    end = time.time() + timeout
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.002)


def state(workdir: Path, step: int = STEPS):
    """What a checkpoint holds, as numpy arrays."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(files.plain(workdir / "checkpoints" / str(step) / "state"))


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_bits(a, b):
    import jax

    pairs = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    different = [jax.tree_util.keystr(path) for (path, x), y in pairs if not np.array_equal(x, y)]
    assert not different, f"{len(different)} leaves differ: {different[:5]}"
