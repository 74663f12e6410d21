"""What a training leaves, without the training; and tensors of whole folders, compared."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from flaxkd import export, pretrained
from flaxkd.pretrained import Folder


def tensors(folder: Path) -> dict:
    return {part: Folder.open(folder).tensors(part) for part in Folder.open(folder).parts}


def same(a: dict, b: dict) -> bool:
    """Equal names, dtypes and bits; with or without the prefix that transformers 5 leaves out."""
    a, b = ({(p, k.removeprefix("text_model.")): x for p, t in c.items() for k, x in t.items()} for c in (a, b))
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def random_student(pipeline: Path) -> tuple[dict, dict]:
    """(config, params) of a UNet that has no mid block and one layer per block, with random weights."""
    config = Folder.open(pipeline).config("unet") | {"layers_per_block": 1, "mid_block_type": None}
    shapes = pretrained.shapes("unet", config)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def shift(params: dict, by: float) -> dict:
    return jax.tree.map(lambda x: x + np.float32(by), params)


def leave(workdir: Path, pipeline: Path, student: tuple[dict, dict]) -> Path:
    """Writes two checkpoints with optimizer and average, the config, figures and samples of a run."""
    config, params = student
    workdir.mkdir()
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        for step in (10, 20):
            now = {"unet": jax.tree.map(jnp.asarray, shift(params, step))}
            state = {"params": now, "ema": {"unet": shift(params, -step)}, "step": jnp.int32(step)}
            state["opt_state"] = optax.sgd(1e-3, momentum=0.9).init(now)
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"at": step}))
            manager.save(step, args=args)
    export.write_record(workdir, Folder.open(pipeline), {"unet": config})
    run = {"teacher": "owner/teacher", "student": "bk_tiny", "blank": None, "data": {"source": "openmoji"}}
    run["sample"] = {"prompts": ["red apple"]}
    (workdir / "config.json").write_text(json.dumps(run))
    (workdir / "samples.png").write_bytes(b"picture")
    records = [{"step": 0, "validation/loss": 2.0}, {"step": 10, "loss": 1.5, "feature/mid_block": 3.0}]
    records.append({"step": 20, "validation/loss": 0.25})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return workdir
