"""Tensors of full size without memory, by diffusers' names: zeros in every shape."""

import functools
import re

import numpy as np
from flax.traverse_util import flatten_dict

from flaxkd import pretrained, students
from flaxkd.pretrained import ARCHITECTURES, keys


def hollow(shape) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), tuple(shape))


@functools.cache
def tensors(part: str, architecture: str) -> dict[str, np.ndarray]:
    leaves = flatten_dict(pretrained.shapes(part, ARCHITECTURES[architecture].configs[part])).items()
    return dict(keys.to_diffusers(path, hollow(leaf.shape)) for path, leaf in leaves)


def unet(architecture: str, student: str | None) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, tensors) of a UNet. A student's are its teacher's, counted anew: tracing it would take seconds."""
    config, whole = ARCHITECTURES[architecture].unet, tensors("unet", architecture)
    if student is None:
        return config, whole
    row, cut = students.get(student), {}
    for key, x in whole.items():
        side, block, kind, layer, leaf = (re.match(r"(?:(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.)?(.+)", key)).groups()
        kept = {"down": row.down, "up": row.up}.get(side, {})
        if side is None and (row.mid or not key.startswith("mid_block")):
            cut[key] = x
        elif side and int(block) in kept:
            at, layers = list(kept).index(int(block)), kept[int(block)]
            if kind.endswith("samplers") and at < len(kept) - 1:
                cut[f"{side}_blocks.{at}.{kind}.{layer}.{leaf}"] = x
            elif int(layer) in layers and not kind.endswith("samplers"):
                cut[f"{side}_blocks.{at}.{kind}.{layers.index(int(layer))}.{leaf}"] = x
    return students.config(row, config), cut


def shapes(tensors: dict) -> dict:
    return {key: tuple(x.shape) for key, x in tensors.items()}
