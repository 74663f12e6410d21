"""Finds a model: a pipeline folder on disk, or a hub id (owner/name), downloaded once."""

import os
import re
from pathlib import Path

from flaxkd.pretrained.families import PARTS

EMBEDDED = Path(__file__).parents[1] / "assets" / "teacher"  # the miniature in the package


def resolve(model: str | os.PathLike | None) -> Path:
    """The pipeline folder of `model`: a folder, a hub id (owner/name), or None for the embedded teacher.

    The small files and the safetensors of a hub id are downloaded into huggingface_hub's store, or reused from there;
    HF_HUB_OFFLINE and HF_HOME are honoured. Raises FileNotFoundError with the remedy if the folder, its
    model_index.json or the network is missing."""
    if model is None:
        folder, origin = EMBEDDED, "the embedded teacher"
    elif Path(model).expanduser().is_dir():
        folder, origin = Path(model).expanduser(), "a pipeline folder of diffusers"
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(model)):
        folder, origin = _download(str(model)), f"hub id {model}"
    else:
        raise FileNotFoundError(
            f"there is no folder {Path(model).expanduser().absolute()}, and {str(model)!r} is not a hub id "
            "(owner/name) either. Give a pipeline folder of diffusers, the one with model_index.json in it."
        )
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no model_index.json, so it is not {origin}. Give the folder that holds unet/, "
            "vae/, text_encoder/, tokenizer/ and scheduler/, not one of these."
        )
    return folder


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    wanted = ["model_index.json", "README.md", "tokenizer/*.txt"]
    wanted += [f"{part}/*.json" for part in (*PARTS, "scheduler", "tokenizer")]
    wanted += [f"{part}/*.safetensors" for part in PARTS]
    try:
        path = snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["*fp16*", "*non_ema*"], etag_timeout=5)
    except Exception as error:  # from hub, network, proxy or disk: the remedy is the same
        raise FileNotFoundError(
            f"{hub_id} is no folder here, and could not be downloaded from the hub:\n"
            f"  {type(error).__name__}: {str(error).strip().splitlines()[0]}\n"
            f"Without network: run `hf download {hub_id} --local-dir DIR` on another machine, copy DIR here, "
            "and pass DIR. If the repository is private or gated, log in with `hf auth login` first."
        ) from error
    return Path(path)
