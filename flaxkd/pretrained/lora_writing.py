"""Writes LoRA files such that every program applies the same: alpha = rank, and PEFT names for diffusers or kohya's for
other programs, with the header that user interfaces read."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from flaxkd.machine import files
from flaxkd.pretrained import families, keys, lora_names
from flaxkd.pretrained.folder import Folder
from flaxkd.pretrained.lora_files import OWN, layers
from flaxkd.pretrained.single_file import MODELSPEC
from flaxkd.pretrained.writing import cast
from flaxkd.weights import lora


def write(
    path: str | os.PathLike, parts: Mapping[str, dict], dialect: str, metadata: Mapping[str, str], dtype=np.float32
) -> Path:
    """Writes adapters as one file, scales folded, alpha = rank, and returns its path.

    parts: {part: adapter}. dialect: "peft" (without alpha) or "kohya" (with alpha for each module). metadata: see
    `header`; identities of the tensors are added to it. Raises ValueError for another ending, or a number too large."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors")
    made_for = [row for row in families.FAMILIES.values() if row.kohya == metadata.get("ss_base_model_version")]
    two = any(len(row.encoders) > 1 for row in made_for) or "text_encoder_2" in parts
    written = {}
    for part, adapter in parts.items():
        for module, pair in lora.layers(adapter).items():
            name = lambda role, part=part, module=module: lora_names.key(dialect, part, module, role, two)
            for role, x in zip("AB", pair, strict=True):
                _, array = keys.to_diffusers((*module, f"lora_{role}", "kernel"), np.asarray(x))
                written[name(role)] = np.ascontiguousarray(array)
            if "alpha" in lora_names.WRITTEN[dialect].ends:
                written[name("alpha")] = np.array(pair[0].shape[-1], np.float32)
    written = cast(written, dtype, str(path))
    content = save(written, {"format": "pt", **metadata})
    start = 8 + int.from_bytes(content[:8], "little")
    identities = {
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as scratch:
        scratch.write_bytes(save(written, {"format": "pt", **metadata, **identities}))
    return path


def header(
    folder: Folder, name: str, parts: Mapping[str, dict], *, student: str | None = None, teacher: str | None = None,
    trained: Mapping[str, object] | None = None,
) -> dict[str, str]:  # fmt: skip
    """The metadata that user interfaces read: of kohya's scripts (ss_), of modelspec, and flaxkd's own.

    folder: the model it is for. name: of the file, its alias. student: row of the table, or a student's file; teacher:
    of that student. trained: further ss_ fields, such as {"steps": 400, "tag_frequency": {...}}."""
    ranks = [a.shape[-1] for adapter in parts.values() for a, _ in lora.layers(adapter).values()]
    rank = str(max(ranks, default=0))
    unet, row = folder.config("unet"), folder.family
    prediction = folder.config("scheduler").get("prediction_type", "epsilon")
    kohya = {
        "base_model_version": row.kohya,
        "v2": str(row is families.FAMILIES["sd2"]),
        "network_module": "networks.lora",
        "network_dim": rank,
        "network_alpha": rank,
        "network_args": "{}",
        "output_name": name,
        "sd_model_name": student or folder.path.name,
        "resolution": f"({folder.size[1]}, {folder.size[0]})",
        **(trained or {}),
    }
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{row.modelspec[prediction]}/lora",
        "implementation": "diffusers",
        "title": name,
        "resolution": f"{folder.size[1]}x{folder.size[0]}",
        "prediction_type": {"v_prediction": "v"}.get(prediction, prediction),
    }
    own = {"student": student, "teacher": teacher, "layers": layers(unet)}
    text = lambda value: value if isinstance(value, str) else json.dumps(value)
    return (
        {f"ss_{key}": text(value) for key, value in kohya.items()}
        | {f"{MODELSPEC}{key}": value for key, value in spec.items()}
        | {f"{OWN}{key}": value for key, value in own.items() if value}
    )
